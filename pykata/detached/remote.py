"""A detached sandbox in use by this process: its machine and its agent, over a connection to its keeper."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectSendStream
from attrs import frozen

from pykata.concurrency import alongside
from pykata.detached.directory import Directory, find
from pykata.detached.welcome import Welcome, from_descriptor
from pykata.detached.wire import PROTOCOL, Message, Wire, unpack_error
from pykata.errors import (
    ConfigError,
    DetachedEndedError,
    DetachedError,
    DetachedLostError,
    HostError,
    PykataError,
    SandboxClosedError,
    VMDiedError,
)
from pykata.host import finish
from pykata.hypervisors.base import VM
from pykata.net.running import RunningNetwork
from pykata.running import Running
from pykata.spec import Disk, Image, NetworkEvent, place_of

log = logging.getLogger(__name__)

EVENTS = 1024           # of the network, that a reader may be behind


class Keeper:
    """The keeper of a sandbox, seen from a client. :func:`connected` makes one."""

    def __init__(self, name: str, wire: Wire) -> None:
        self.name = name
        self.grown = anyio.Event()
        """Set when the log has grown, and replaced."""
        self.network = RemoteGuard(self)
        self._wire = wire
        self._numbers = count(1)
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._end: PykataError | None = None
        self._gone = anyio.Event()

    async def call(self, do: str, *, descriptors: tuple[int, ...] = (), **arguments: object) -> Message:
        """Ask for something; returns the answer, whose ``body["ok"]`` is the result. Raises what the keeper says."""
        number = next(self._numbers)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            if self._gone.is_set():
                raise self.why()
            try:
                await self._wire.send({"id": number, "do": do, **arguments}, descriptors)
            except anyio.BrokenResourceError:
                raise await self.gone() from None       # its last words may still be on their way
            answer = await future
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().close()     # it came in the moment in which we were cancelled
            raise
        finally:
            del self._pending[number]
        if "error" in answer.body:
            raise unpack_error(answer.body["error"])
        return answer

    async def listen(self) -> None:
        """Take what the keeper says, until it ends."""
        try:
            while (message := await self._wire.receive()) is not None:
                self._take(message)
        finally:
            self._gone.set()
            self.network.end()
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(self.why())
                    future.exception()      # seen: who asked may have been cancelled
            self._grow()

    async def gone(self) -> PykataError:
        """Wait until the keeper is gone, and the sandbox with it; returns why."""
        await self._gone.wait()
        return self.why()

    @property
    def is_gone(self) -> bool:
        """The sandbox has ended."""
        return self._gone.is_set()

    def why(self) -> PykataError:
        """Why the sandbox ended."""
        return self._end or DetachedLostError(
            f"the keeper of sandbox {self.name!r} has ended without a word", name=self.name, hint="pykata gc cleans up"
        )

    def _take(self, message: Message) -> None:
        body = message.body
        match body:
            case {"id": int(number)} if (future := self._pending.get(number)) is not None and not future.done():
                future.set_result(message)
                return
            case {"event": "ended", "error": dict(error)}:
                self._end = unpack_error(error)
            case {"event": "log"}:
                self._grow()
            case {"event": "network", "what": dict(what)}:
                self.network.tell(NetworkEvent(**what))
        message.close()

    def _grow(self) -> None:
        self.grown.set()
        self.grown = anyio.Event()


class RemoteGuard:
    """What keeps the policy of a detached sandbox; a :class:`~pykata.spec.Guard`."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._readers: set[MemoryObjectSendStream[NetworkEvent]] = set()
        self._asked = False

    async def events(self) -> AsyncIterator[NetworkEvent]:
        """Those from now on."""
        send, receive = anyio.create_memory_object_stream[NetworkEvent](EVENTS)
        self._readers.add(send)
        try:
            with send, receive:
                if not self._asked:
                    self._asked = True
                    await self._keeper.call("events")
                async for event in receive:
                    yield event
        finally:
            self._readers.discard(send)

    async def allow(self, *rules: str) -> None:
        """Let the guest reach more."""
        await self._keeper.call("allow", rules=rules)

    async def deny(self, *rules: str) -> None:
        """Let the guest reach less."""
        await self._keeper.call("deny", rules=rules)

    def tell(self, event: NetworkEvent) -> None:
        """Pass an event on to who reads; who is too slow loses it."""
        for reader in self._readers:
            with suppress(anyio.WouldBlock):
                reader.send_nowait(event)

    def end(self) -> None:
        """There are no more."""
        for reader in self._readers:
            reader.close()


class RemoteVM(VM):
    """The virtual machine of a keeper."""

    unsavable = "it is detached, and belongs to its keeper; fork or save one that this program has entered"

    def __init__(self, keeper: Keeper, welcome: Welcome) -> None:
        self.pid = welcome.vmm
        self.accel = welcome.accel
        self.spawned_at = welcome.spawned_at
        self.ready_at = welcome.ready_at
        self._keeper = keeper
        self._console = welcome.console
        self._plugs = count(1)

    @asynccontextmanager
    async def plug(self, disk: Disk) -> AsyncIterator[str]:
        number = next(self._plugs)
        try:
            yield await self._plugged(disk, number)
        finally:
            await finish(self._unplugged(number))

    async def _plugged(self, disk: Disk, number: int) -> str:
        try:
            descriptor = os.open(place_of(disk), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise HostError(f"can't open the disk {disk.path}: {exc.strerror}") from exc
        try:
            answer = await self._keeper.call(
                "plug", plug=number, tag=disk.tag, format=disk.format, device=disk.is_device, descriptors=(descriptor,))
        except (DetachedLostError, SandboxClosedError) as ended:
            raise self._as_death(ended) from ended
        finally:
            os.close(descriptor)
        return str(answer.body["ok"])

    async def _unplugged(self, number: int) -> None:
        with suppress(PykataError):         # it is gone, and the disk with it
            await self._keeper.call("unplug", plug=number)

    def console(self) -> str:
        return self._console

    async def pause(self) -> None:
        raise ConfigError("a detached sandbox can't be paused: it may be others' as well")

    async def resume(self) -> None:
        raise ConfigError("a detached sandbox can't be paused, nor go on after that")

    def end(self, why: VMDiedError) -> None:
        raise NotImplementedError("only the keeper ends its machine")

    async def died(self) -> VMDiedError:
        return self._as_death(await self._keeper.gone())

    def _as_death(self, why: PykataError) -> VMDiedError:
        if isinstance(why, VMDiedError):
            self._console = why.console
            return why
        return VMDiedError(why.message, console=self._console, hint=why.hint)


@frozen
class Remote:
    """A connected sandbox, and its main container, if it has one."""

    running: Running
    main: tuple[str, Image] | None


@asynccontextmanager
async def connected(directory: Directory) -> AsyncIterator[Keeper]:
    """The keeper of a sandbox.

    Raises DetachedNotFoundError, DetachedEndedError and DetachedLostError.
    """
    wire = Wire(_dialled(directory))
    try:
        wire.check_peer()
        keeper = Keeper(directory.name, wire)
        async with alongside(keeper.listen()):
            yield keeper
    finally:
        wire.close()


@asynccontextmanager
async def remote(name: str) -> AsyncIterator[Remote]:
    """A detached sandbox, to be used like one of our own. Leaving ends what we have in it, and not the sandbox."""
    from pykata.agent.client import connect

    async with AsyncExitStack() as stack:
        keeper = await stack.enter_async_context(connected(find(name)))
        sock, welcome, answer = await _attached(keeper)
        agent = await stack.enter_async_context(connect(sock, bulk=False))   # the keeper is in between
        running = Running(
            options=welcome.options, bundle=welcome.bundle, run_dir=welcome.run_dir,
            vm=RemoteVM(keeper, welcome), agent=agent, memory_limit=welcome.memory_limit, entered=welcome.entered,
            timings=welcome.timings,
            network=RunningNetwork(
                welcome.ports, welcome.addresses, welcome.via, keeper.network if welcome.has_policy else None,
            ),
            namespace=str(answer["namespace"]),
        )  # fmt: skip
        try:
            yield Remote(running, welcome.main)
        finally:
            running.broken = SandboxClosedError("this sandbox was left", hint="use it inside its 'async with' block")


async def _attached(keeper: Keeper) -> tuple[socket.socket, Welcome, Mapping[str, Any]]:
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            answer = await keeper.call("attach", protocol=PROTOCOL, descriptors=(theirs.fileno(),))
        try:
            return ours, from_descriptor(answer.descriptors[0], Welcome), answer.body["ok"]
        finally:
            answer.close()
    except BaseException:
        ours.close()
        raise


def _dialled(directory: Directory) -> socket.socket:
    """A connection to the keeper. Raises why there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        with directory.reachable() as path:
            sock.connect(path)
    except OSError as exc:
        sock.close()
        if isinstance(exc, FileNotFoundError | ConnectionRefusedError):
            raise _not_there(directory) from None
        # EAGAIN: as many wait as the socket's queue holds, or the keeper doesn't run at all.
        said = f"can't reach the keeper of sandbox {directory.name!r}: {exc.strerror}"
        raise HostError(said, hint="try again") from exc
    return sock


def _not_there(directory: Directory) -> PykataError:
    name = directory.name
    state = directory.read()
    if state.phase == "ended":
        return DetachedEndedError(f"sandbox {name!r} has ended: {state.why}", name=name, hint=f"pykata rm {name}")
    if state.phase == "lost":
        return DetachedLostError(f"sandbox {name!r} is gone: {state.why}", name=name, hint="pykata gc cleans up")
    return DetachedError(f"sandbox {name!r} has no socket", name=name, hint=f"was {directory.path} changed?")
