"""A process of the agent's own in a container that works on files there: files.proto over the stdio of a Run."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NoReturn

import anyio

from pykata.agent.run import Exited, OutputEvent, RunStream, Stderr, Stdout
from pykata.agent.typed import decoded
from pykata.agent.v1 import Process, ProcessTool, Start
from pykata.errors import AgentProtocolError, AgentRefusedError, AgentTimeoutError, FileError, SandboxClosedError
from pykata.files import failures
from pykata.files.v1 import Attributes, Request, Response
from pykata.running import Running

MAX_ANSWER = 2 * 1024 * 1024    # bytes; content comes in pieces of at most 1 MiB
MAX_CHUNK = 512 * 1024 - 4      # bytes of data sent as one frame; with its length, whole pieces for the agent
WINDOW = 1024 * 1024            # bytes that it may send before more is wanted
HEAD = 4                        # bytes of a frame's length
DEADLINE = 60.0                 # seconds in which a guest that works gives any answer


class LostError(FileError):
    """The process ended before it answered: what it was asked for may have been done."""


class Tool:
    """One such process. At most one task may use it at a time. Made by :func:`tool`."""

    def __init__(self, running: Running, stream: RunStream) -> None:
        self._running = running
        self._stream = stream
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._exited: Exited | None = None
        self._path = b""
        self.idle = True
        """No answer is due: it can take the next request."""
        self.left = False
        """Its block was left."""

    @property
    def gone(self) -> bool:
        """It takes no more requests."""
        return self._exited is not None or self._stream.gone

    async def ask(self, request: Request, path: bytes) -> Response:
        """Send a request and return its only answer. Raises :class:`FileError` for one about ``path`` that failed."""
        await self.begin(request, path)
        response = await self.answer()
        self.idle = True
        return response

    async def begin(self, request: Request, path: bytes) -> None:
        """Send a request that has several answers, or data."""
        self.idle, self._path = False, path
        message = bytes(request)
        await self._send(len(message).to_bytes(HEAD) + message)

    async def answer(self, deadline: float | None = DEADLINE) -> Response:
        """The next answer. Raises :class:`FileError` if it is a failure; the tool is idle then."""
        with anyio.move_on_after(deadline):
            response = self._decoded(await self._frame())
            if response.failure is not None:
                self.idle = True
                raise failures.from_guest(response.failure, self._path)
            return response
        raise AgentTimeoutError(f"the guest didn't answer a request for files within {deadline:g} s")

    async def attributes(self) -> Attributes:
        """The next answer, which has to be about a file."""
        response = await self.answer(None)
        if response.attributes is None:
            self.broken("sent another answer than a file's attributes")
        return response.attributes

    async def done(self, deadline: float | None = DEADLINE) -> None:
        """The next answer, which has to say that it is done."""
        response = await self.answer(deadline)
        if response.done is None:
            self.broken("sent another answer than that it is done")

    async def send(self, data: bytes | memoryview) -> None:
        """Send data. A failure to write it is raised now if it is known already, else by what comes after."""
        view = memoryview(data)
        while view:
            piece, view = view[:MAX_CHUNK], view[MAX_CHUNK:]
            await self._send_chunk(b"".join((len(piece).to_bytes(HEAD), piece)))

    async def send_from(self, fill: Callable[[memoryview], Awaitable[int]]) -> None:
        """The same with what ``fill`` puts into the space it is given; the data ends where it is less."""
        frame = memoryview(bytearray(HEAD + MAX_CHUNK))
        size = MAX_CHUNK
        while size == MAX_CHUNK and (size := await fill(frame[HEAD:])):
            frame[:HEAD] = size.to_bytes(HEAD)
            await self._send_chunk(frame[: HEAD + size])

    async def _send_chunk(self, frame: bytes | memoryview) -> None:
        await self._send(frame)
        if self._stream.gone:
            await self.answer()
            self.broken("ended in the middle of the data that it was sent")

    async def complete(self) -> None:
        """Say that all data was sent, and wait until it is in its place."""
        await self._send(bytes(HEAD))
        await self.done(None)
        self.idle = True

    async def data(self) -> bytes:
        """The next piece of data that it sends; empty at the end, which is only one if nothing failed."""
        if self._stdout:
            piece = bytes(self._stdout)
            self._stdout.clear()
            return piece
        while (event := await self._event()) is not None:
            if isinstance(event, Stdout):
                return event.data
            self._keep(event)
        await self._check_end()
        return b""

    @contextmanager
    def diverted(self, pipe: int) -> Iterator[None]:
        """While this lasts, data may go to this pipe, which never waits; what :meth:`data` returns is written there."""
        with self._stream.diverted(pipe):
            yield

    async def over(self) -> bool:
        """Wait until there is more to come, or nothing any more, which is only true if nothing failed."""
        while not self._stdout and await self._advance():
            pass
        if not self._stdout:
            await self._check_end()
        return not self._stdout

    def broken(self, what: str) -> NoReturn:
        """The guest did what files.proto doesn't allow."""
        raise AgentProtocolError(f"the guest's process for files {what}")

    async def _check_end(self) -> None:
        if self._stderr:
            self._stdout, self._stderr = self._stderr, bytearray()
            await self.answer()
            self.broken("reported no failure where it should have")
        if self._exited is None or self._exited.exit_code != 0:
            raise self._lost()

    async def _frame(self) -> bytes:
        while len(self._stdout) < HEAD or len(self._stdout) < HEAD + (size := int.from_bytes(self._stdout[:HEAD])):
            if len(self._stdout) >= HEAD and size > MAX_ANSWER:
                self.broken(f"announced an answer of {size} bytes")
            if not await self._advance():
                raise self._lost()
        frame = bytes(self._stdout[HEAD : HEAD + size])
        del self._stdout[: HEAD + size]
        return frame

    def _decoded(self, frame: bytes) -> Response:
        try:
            return decoded(Response, frame)
        except ValueError as exc:
            self.broken(f"sent an answer that {exc}")

    async def _advance(self) -> bool:
        """Take in what comes next; False after the end."""
        if (event := await self._event()) is None:
            return False
        self._keep(event)
        return True

    async def _event(self) -> OutputEvent | None:
        """What comes next; None after the end. It makes room for more: who doesn't want any doesn't ask."""
        self._check_open()
        if self._exited is not None:
            return None
        try:
            async with self._running.explained():
                event = await anext(self._stream)
        except AgentRefusedError:
            self._check_open()      # its own end of the call was reset
            raise
        match event:
            case Stdout(data):
                self._stream.took("stdout", len(data))
            case Stderr(data):
                self._stream.took("stderr", len(data))
        return event

    def _keep(self, event: OutputEvent) -> None:
        match event:
            case Stdout(data) if len(self._stdout) + len(data) <= 2 * MAX_ANSWER:
                self._stdout += data
            case Stderr(data) if len(self._stderr) + len(data) <= MAX_ANSWER:
                self._stderr += data
            case Stdout():
                self.broken("answered without end")
            case Stderr():
                self.broken("complained without end")
            case Exited():
                self._exited = event

    def _check_open(self) -> None:
        if self.left:
            raise SandboxClosedError("this file is closed", hint="use it inside its 'async with' block")

    async def _send(self, data: bytes | memoryview) -> None:
        self._check_open()
        view = memoryview(data)
        while view and self._stream.takes_stdin:
            if not self._stream.stdin_room:
                await self._advance()       # the news of room come between those of output
                continue
            async with self._running.explained():
                sent = await self._stream.send_some(view)
            view = view[sent:]

    def _lost(self) -> LostError:
        end = self._exited
        how = "ended" if end is None or not end.signal else f"was killed by signal {end.signal}"
        if end is not None and end.oom_killed:
            how = "was killed: the container has no memory left"
        return LostError(
            f"the process that works on the container's files {how}", errno=errno.EIO, strerror="cut off",
            filename=self._path.decode("utf-8", "surrogateescape"),
        )  # fmt: skip


@asynccontextmanager
async def tool(
    running: Running, container: str, user: str, kind: ProcessTool = ProcessTool.FILES, *, much: bool = False
) -> AsyncIterator[Tool]:
    """A process of its own for files of a container, as a user of it; killed when the block is left.

    ``much`` comes from it or goes to it: in bulk, then.
    """
    await running.settled()
    running.check()
    process = Process(id=running.new_id("f"), user=user, tool=kind)
    start = Start(container_id=container, process=process, window=WINDOW if much else 0)
    # Nothing is awaited on the way out, so that a cancellation leaves nothing behind.
    async with running.agent.run(start) as stream:
        async with running.explained():
            await stream.started()
        mine = Tool(running, stream)
        try:
            yield mine
        finally:
            mine.left = True
