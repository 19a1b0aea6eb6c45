"""QEMU's control channel: the machine protocol (docs/interop/qmp-spec.rst) over one end of a socket pair.

The part of QMP that we use is a page. qemu.qmp, which has all of it, takes 33 ms to import, a third of what a start
from a template may take, and keeps an event queue without a bound. This one doesn't trust its peer, which a guest may
have taken over: a line has a limit, and a fault of any kind closes the connection.
"""

from __future__ import annotations

import array
import asyncio
import json
import socket
from collections.abc import Callable, Mapping
from itertools import count

from pykata.errors import VMError, printable

LIMIT = 1024 * 1024         # bytes of one message
PATIENCE = 20.0             # seconds for an answer; on a busy host it takes some 10 ms


class QMPError(VMError):
    """QEMU refused a command."""


class QMPClosedError(VMError):
    """The control channel is closed: QEMU has ended, or said what it must not."""


class QMP:
    """A connection. ``on_event`` gets each event's name and data, in the order they came."""

    def __init__(self, stream: socket.socket, on_event: Callable[[str, Mapping[str, object]], None]) -> None:
        stream.setblocking(False)
        self._stream = stream
        self._on_event = on_event
        self.on_close: Callable[[], None] = lambda: None
        """Called once, when the connection has ended."""
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._numbers = count(1)
        self._turn = asyncio.Lock()
        self._greeting: asyncio.Future[Mapping[str, object]] = self._loop.create_future()
        self._reply: tuple[int, asyncio.Future[object]] | None = None
        self._closed = asyncio.Event()
        self._loop.add_reader(stream.fileno(), self._receive)

    async def negotiate(self) -> Mapping[str, object]:
        """Wait for QEMU's greeting and leave negotiation mode; returns the greeting."""
        greeting = await asyncio.shield(self._greeting)
        await self.execute("qmp_capabilities")
        return greeting

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None
    ) -> object:
        """Run a command and return what it returns. ``fd`` is passed along with it (``add-fd``, ``getfd``).

        One command runs at a time: QEMU keeps a single passed descriptor, so the next command's must not overtake it.
        If the caller is cancelled the command still completes, and the next one waits for that. A QEMU that doesn't
        answer (it was stopped, or is stuck) loses its connection after :data:`PATIENCE`.
        """
        await self._turn.acquire()
        reply: asyncio.Future[object] = self._loop.create_future()
        try:
            if self._closed.is_set():
                raise QMPClosedError(f"QEMU is gone: can't {command}")
            number = next(self._numbers)
            message = {"execute": command, "arguments": arguments or {}, "id": number}
            rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            self._send(json.dumps(message).encode(), rights)
        except BaseException:
            self._turn.release()
            raise
        self._reply = number, reply
        reply.add_done_callback(lambda _: self._turn.release())
        late = self._loop.call_later(PATIENCE, self.close, f"QEMU didn't answer {command} within {PATIENCE:g} s")
        reply.add_done_callback(lambda _: late.cancel())
        return await asyncio.shield(reply)

    async def closed(self) -> None:
        """Wait until the connection has ended."""
        await self._closed.wait()

    def close(self, why: str = "the control channel was closed") -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._loop.remove_reader(self._stream.fileno())
        self._stream.close()
        error = QMPClosedError(why)
        for future in (self._greeting, self._reply and self._reply[1]):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()      # seen: nobody has to wait for it
        self.on_close()

    def _send(self, message: bytes, rights: list[tuple[int, int, array.array[int]]]) -> None:
        # The socket has room: our messages are small, and QEMU has read one before we send the next.
        try:
            sent = self._stream.sendmsg([message], rights)
        except OSError as exc:
            self.close(f"QEMU closed the control channel: {exc.strerror}")
            raise QMPClosedError(f"QEMU is gone: {exc.strerror}") from exc
        if sent != len(message):
            self.close("QEMU doesn't read from the control channel")
            raise QMPClosedError("QEMU doesn't read from the control channel")

    def _receive(self) -> None:
        try:
            data = self._stream.recv(65536)
        except BlockingIOError:
            return None
        except OSError as exc:
            return self.close(f"QEMU closed the control channel: {exc.strerror}")
        if not data:
            return self.close("QEMU closed the control channel")
        *lines, rest = (self._received + data).split(b"\n")
        self._received = bytearray(rest)
        if len(self._received) > LIMIT:
            return self.close("QEMU sent a message without end")
        for line in lines:
            try:
                self._dispatch(json.loads(line))
            except (ValueError, RecursionError):
                return self.close(f"QEMU sent what isn't QMP: {printable(bytes(line))}")
        return None

    def _dispatch(self, message: object) -> None:
        match message:
            case {"QMP": {}} if not self._greeting.done():
                assert isinstance(message, dict)
                self._greeting.set_result(message)
            case {"event": str(name), "data": dict(data)}:
                self._on_event(name, data)
            case {"event": str(name)}:
                self._on_event(name, {})
            case {"id": int(number)} if self._reply is not None and self._reply[0] == number:
                reply, self._reply = self._reply[1], None
                match message:
                    case {"error": {"desc": str(said)}}:
                        reply.set_exception(QMPError(f"QEMU says: {printable(said.encode(), 500)}"))
                    case {"return": value}:
                        reply.set_result(value)
                    case _:
                        reply.set_exception(QMPError("QEMU answered neither with a result nor with an error"))
            case _:
                raise ValueError("unexpected message")
