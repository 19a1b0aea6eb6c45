"""One client of a keeper: what it asks, and what it has of the sandbox for as long as it is there."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from attrs import asdict, define, field

from pykata.detached.welcome import to_descriptor
from pykata.detached.wire import PROTOCOL, Message, Wire, pack_error
from pykata.errors import DetachedError, PykataError
from pykata.host import finish
from pykata.keeper.forward import Containers, Forwarder
from pykata.making import remove_container
from pykata.spec import Disk

if TYPE_CHECKING:
    from pykata.keeper.keep import Keeper


@define
class Plug:
    """A disk that a client has in the machine, or waits for."""

    scope: anyio.CancelScope = field(factory=anyio.CancelScope)
    released: anyio.Event = field(factory=anyio.Event)


class Client:
    """A connected process. When it goes, so does what it had: first its processes, its containers, then its disks."""

    def __init__(self, keeper: Keeper, wire: Wire, number: int) -> None:
        self._keeper = keeper
        self._wire = wire
        self._number = number
        self._containers = Containers()
        self._plugs: dict[int, Plug] = {}
        self._asked: dict[str, Callable[[Message], Awaitable[object]]] = {
            "attach": self._attach, "plug": self._plug, "unplug": self._unplug, "signal": self._signal,
            "stop": self._stop, "watch": self._watch, "allow": self._allow, "deny": self._deny, "events": self._events,
        }  # fmt: skip

    async def serve(self) -> None:
        """Do what the client asks for, until it goes."""
        async with anyio.create_task_group() as plugs:
            async with anyio.create_task_group() as calls:
                while (message := await self._wire.receive()) is not None:
                    # A plug outlives the calls: what runs from a disk must be gone before the disk is.
                    group = plugs if message.body.get("do") == "plug" else calls
                    group.start_soon(self._take, message)
                calls.cancel_scope.cancel()
            await finish(self._remove_containers())
            plugs.cancel_scope.cancel()

    async def _take(self, message: Message) -> None:
        number = message.body.get("id")
        try:
            handler = self._asked.get(str(message.body.get("do")))
            if handler is None:
                raise DetachedError(f"this keeper doesn't know how to {message.body.get('do')!r}")
            await handler(message)
        except (PykataError, LookupError, TypeError, ValueError) as error:      # a message may lack something
            await self._send({"id": number, "error": pack_error(error)})
        finally:
            message.close()

    async def _answer(self, message: Message, result: object = None, descriptors: tuple[int, ...] = ()) -> None:
        await self._send({"id": message.body.get("id"), "ok": result}, descriptors)

    async def _send(self, body: Mapping[str, object], descriptors: tuple[int, ...] = ()) -> None:
        with suppress(anyio.BrokenResourceError):       # whoever receives from it sees the end, too
            await self._wire.send(body, descriptors)

    async def _attach(self, message: Message) -> None:
        """The client passes its end of a connection to the agent, and gets to know the sandbox."""
        if message.body.get("protocol") != PROTOCOL or not message.descriptors:
            raise DetachedError(
                f"the keeper of this sandbox speaks protocol {PROTOCOL}, not {message.body.get('protocol')}",
                hint="use the pykata that started it",
            )
        self._keeper.running.check()
        welcome = to_descriptor(self._keeper.welcome())
        try:
            await self._answer(message, {"namespace": f"{self._number}-"}, (welcome,))
        finally:
            os.close(welcome)
        sock = socket.socket(fileno=os.dup(message.descriptors[0]))
        await Forwarder(self._keeper.running.agent, self._containers).serve(sock)

    async def _plug(self, message: Message) -> None:
        plug = self._plugs[int(message.body["plug"])] = Plug()
        try:
            with plug.scope:
                # The descriptor, not the path: the client may be the only one who finds the file by its name.
                path = Path(f"/proc/self/fd/{message.descriptors[0]}")
                body = message.body
                disk = Disk(str(body["tag"]), path, body["format"], is_device=body["device"])
                async with self._keeper.running.plugged(disk) as serial:
                    await self._answer(message, serial)
                    await anyio.sleep_forever()
        finally:
            plug.released.set()

    async def _unplug(self, message: Message) -> None:
        if (plug := self._plugs.pop(int(message.body["plug"]), None)) is not None:
            plug.scope.cancel()
            await plug.released.wait()
        await self._answer(message)

    async def _remove_containers(self) -> None:
        for identity in self._containers.ids:
            await remove_container(self._keeper.running, identity)

    async def _signal(self, message: Message) -> None:
        await self._keeper.signal(int(message.body["signal"]))
        await self._answer(message)

    async def _stop(self, message: Message) -> None:
        self._keeper.stop(float(message.body["grace"]))
        await self._answer(message)

    async def _watch(self, message: Message) -> None:
        """Tell the client of each growth of the log; several at once, if it is slow."""
        await self._answer(message)
        count = 0
        while True:
            count = await self._keeper.log.beyond(count)
            await self._send({"event": "log"})

    async def _allow(self, message: Message) -> None:
        await self._keeper.running.network.allow(*map(str, message.body["rules"]))
        await self._answer(message)

    async def _deny(self, message: Message) -> None:
        await self._keeper.running.network.deny(*map(str, message.body["rules"]))
        await self._answer(message)

    async def _events(self, message: Message) -> None:
        """Tell the client of each event of the network, from now on. Asked for once."""
        await self._answer(message)
        async for event in self._keeper.running.network.events():
            await self._send({"event": "network", "what": asdict(event)})
