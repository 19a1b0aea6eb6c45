"""The connection to a keeper, from its client's side: what is asked, and what the keeper tells of itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count

import anyio
from anyio.streams.memory import MemoryObjectSendStream

from pykata.concurrency import alongside
from pykata.detached.directory import Directory
from pykata.detached.wire import Message, Wire, unpack_error
from pykata.errors import (
    DetachedEndedError,
    DetachedError,
    DetachedLostError,
    HostError,
    PykataError,
    ShareLostError,
)
from pykata.running import Loss
from pykata.spec import NetworkEvent

EVENTS = 1024           # of the network, that a reader may be behind


class Keeper:
    """The keeper of a sandbox, seen from a client. :func:`connected` makes one."""

    def __init__(self, name: str, wire: Wire) -> None:
        self.name = name
        self.grown = anyio.Event()
        """Set when the log has grown, and replaced."""
        self.network = RemoteGuard(self)
        self.losses: list[Loss] = []
        """Of the host's files, as far as :meth:`hear` and :meth:`listen` have taken the keeper's words."""
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

    def hear(self) -> None:
        """Take what has come by now: the keeper tells of a loss before the guest has an error by it."""
        while (message := self._wire.receive_now()) is not None:
            self._take(message)

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
            case {"event": "loss", "of_images": bool(of_images), "error": dict(error)}:
                self.losses.append(Loss(of_images, _as_loss(unpack_error(error))))
            case {"event": "log"}:
                self._grow()
            case {"event": "network", "what": dict(what)}:
                self.network.tell(NetworkEvent(**what))
        message.close()

    def _grow(self) -> None:
        self.grown.set()
        self.grown = anyio.Event()


def _as_loss(error: PykataError) -> ShareLostError:
    return error if isinstance(error, ShareLostError) else ShareLostError(error.message, hint=error.hint)


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
