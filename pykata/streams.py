"""The standard streams of a process in a container."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from pykata.errors import ConfigError
from pykata.running import Running

if TYPE_CHECKING:
    from pykata.agent.run import RunStream

LONGEST_LINE = 64 * 1024
"""Bytes of a line, beyond which it comes in pieces."""


class Source(Protocol):
    """Where a stream's bytes come from: the process."""

    @property
    def ended(self) -> bool: ...

    def advance(self, enough: Callable[[], bool]) -> Awaitable[None]: ...


class Output:
    """Standard output or error of a process: an async iterator of bytes, in pieces as they came."""

    def __init__(self, source: Source, took: Callable[[int], None], *, over: bool = False) -> None:
        self._source = source
        self._took = took
        self._over = over
        self._pieces: deque[bytes] = deque()
        self._line = bytearray()        # of which the end has still to come

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not await self._wait():
            raise StopAsyncIteration
        return self.take()

    async def read(self) -> bytes:
        """All that is left, up to the end of the stream."""
        return b"".join([piece async for piece in self])

    def lines(self, limit: int = LONGEST_LINE) -> Lines:
        """The same by lines, each with the newline at its end; the last one may lack it.

        A line of more than ``limit`` bytes comes in pieces of that size, of which only the last ends with the newline.
        A cancelled wait loses nothing: the next one, or another way to read, goes on where it was.
        """
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ConfigError(f"limit={limit!r} is not the length of a line", hint="bytes, from 1 on")
        return Lines(self, limit)

    @property
    def waiting(self) -> bool:
        """Something has come that wasn't read yet."""
        return bool(self._line or self._pieces)

    def take(self) -> bytes:
        """The next piece that has come and wasn't read yet, without waiting; empty if there is none."""
        if self._line:
            piece = bytes(self._line)
            self._line.clear()
            return piece
        return self._pop() if self._pieces else b""

    def put(self, piece: bytes) -> None:
        """Take in what came from the guest."""
        self._pieces.append(piece)

    def end(self, over: bool) -> None:
        """Nothing more comes, if ``over``."""
        self._over |= over

    async def line(self, limit: int) -> bytes:
        """The next line, at most ``limit`` bytes of it; empty at the end of the stream."""
        seen = 0
        while (end := self._line.find(b"\n", seen, limit)) < 0 and len(self._line) < limit:
            seen = len(self._line)
            if not self._pieces and not await self._more():
                return self._cut(seen)
            self._line += self._pop()
        return self._cut(end + 1 if end >= 0 else limit)

    def _cut(self, size: int) -> bytes:
        line = bytes(self._line[:size])
        del self._line[:size]
        return line

    def _pop(self) -> bytes:
        piece = self._pieces.popleft()
        self._took(len(piece))
        return piece

    async def _wait(self) -> bool:
        return bool(self._line) or await self._more()

    async def _more(self) -> bool:
        while not self._pieces:
            if self._over or self._source.ended:
                return False
            await self._source.advance(lambda: bool(self._pieces) or self._over)
        return True


class Lines:
    """Iterates over the lines of an :class:`Output`."""

    def __init__(self, output: Output, limit: int) -> None:
        self._output = output
        self._limit = limit

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> bytes:
        if line := await self._output.line(self._limit):
            return line
        raise StopAsyncIteration


class Input:
    """Standard input of a process. Sending waits while the process doesn't read."""

    def __init__(self, source: Source, running: Running, stream: RunStream) -> None:
        self._source = source
        self._running = running
        self._stream = stream

    async def send(self, data: bytes) -> None:
        """Write ``data``. A process that closed its stdin, or ended, is no error: the data is gone, as in a shell.

        When this is cancelled, part of the data may have been written.
        """
        view = memoryview(data)
        while view and self._stream.takes_stdin:
            if not self._stream.stdin_room:
                # The news of room come between those of output, of which no more comes than there is room for here.
                await self._source.advance(lambda: self._stream.stdin_room > 0)
                continue
            async with self._running.explained():
                sent = await self._stream.send_some(view)
            view = view[sent:]

    async def aclose(self) -> None:
        """End of input; on a terminal, its end-of-file character."""
        async with self._running.explained():
            await self._stream.close_stdin()
