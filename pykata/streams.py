"""The standard streams of a process in a container."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import anyio

from pykata.buffers import bytes_of
from pykata.errors import ConfigError
from pykata.running import Running

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pykata.agent.run import RunStream

LONGEST_LINE = 64 * 1024
"""Bytes of a line, beyond which it comes in pieces."""

LONGEST_PIECE = 64 * 1024
"""Bytes of stdin that are sent at once at most."""

MAX_WRITTEN = 1024 * 1024
"""Bytes of stdin that may wait to be sent before another ``write`` is refused."""


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

    async def read(self, n: int = -1) -> bytes:
        """All that is left, up to the end of the stream; with ``n``, at most so many bytes as soon as there are any."""
        if n < 0:
            return b"".join([piece async for piece in self])
        if n == 0 or not await self._wait():
            return b""
        if not self._line:
            self._line += self._pop()
        return self._cut(n)

    async def readexactly(self, n: int) -> bytes:
        """The next ``n`` bytes. At the end of the stream an :class:`asyncio.IncompleteReadError` has what came."""
        if n < 0:
            raise ConfigError(f"n={n} is not a number of bytes")
        while len(self._line) < n:
            if not await self._more():
                raise asyncio.IncompleteReadError(self._cut(n), n)
            self._line += self._pop()
        return self._cut(n)

    async def readline(self) -> bytes:
        """The next line with its newline, which the last one may lack; empty at the end of the stream.

        One of more than 64 KiB comes in pieces of that size, as from :meth:`lines`.
        """
        return await self.line(LONGEST_LINE)

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        """What comes up to the next ``separator``, with that.

        Raises :class:`asyncio.IncompleteReadError`, with what came, when the stream ends before it, and
        :class:`asyncio.LimitOverrunError`, which takes nothing, when there is none in the next 64 KiB.
        """
        if not isinstance(separator, bytes) or not separator:
            raise ConfigError(f"separator={separator!r:.80} is not bytes that can be found")
        seen = 0
        while (start := self._line.find(separator, seen)) < 0:
            seen = max(len(self._line) - len(separator) + 1, 0)
            if len(self._line) > LONGEST_LINE:
                raise asyncio.LimitOverrunError(f"no separator in {LONGEST_LINE} bytes", seen)
            if not await self._more():
                raise asyncio.IncompleteReadError(self._cut(len(self._line)), None)
            self._line += self._pop()
        return self._cut(start + len(separator))

    def at_eof(self) -> bool:
        """All of it was read."""
        return not self.waiting and (self._over or self._source.ended)

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
    """Standard input of a process. Sending waits while the process doesn't read.

    :meth:`send` and :meth:`aclose` are all that is needed; the other names are those of :class:`asyncio.StreamWriter`.
    """

    def __init__(self, source: Source, running: Running, stream: RunStream) -> None:
        self._source = source
        self._running = running
        self._stream = stream
        self._written = bytearray()     # by write(), and not sent yet
        self._turn = anyio.Lock()       # of whoever sends it
        self._closing = False

    async def send(self, data: Buffer) -> None:
        """Write ``data``. A process that closed its stdin, or ended, is no error: the data is gone, as in a shell.

        When this is cancelled, part of the data may have been written.
        """
        view = bytes_of(data)
        await self.drain()
        while view and self._stream.takes_stdin:
            view = view[await self._send_some(view) :]

    async def aclose(self) -> None:
        """End of input, after all that was written; on a terminal, its end-of-file character."""
        self._closing = True
        await self.drain()
        async with self._running.explained():
            await self._stream.close_stdin()

    def write(self, data: Buffer) -> None:
        """Write ``data`` without waiting: what the process has no room for is sent in a :meth:`drain`, or as it reads.

        Once more than 1 MiB waits, another write is a :class:`ConfigError`: ``await stdin.drain()`` between them.
        """
        view = bytes_of(data)
        if len(self._written) > MAX_WRITTEN:
            raise ConfigError(
                f"more than {MAX_WRITTEN} bytes wait for the process to read them", hint="await stdin.drain() meanwhile"
            )
        if self._closing:
            return      # as with asyncio: its end was written
        self._written += view
        self.push()

    def writelines(self, data: Iterable[Buffer]) -> None:
        """As :meth:`write`, of several at once."""
        self.write(b"".join([bytes_of(each) for each in data]))

    async def drain(self) -> None:
        """Wait until what was written has been sent: the process has read it, but for some 100 KiB."""
        while self._written and self._stream.takes_stdin:
            async with self._turn:
                while self._written and self._stream.takes_stdin:
                    self._sent(await self._send_some(self._next()))
        self.push()

    def close(self) -> None:
        """End of input, after all that was written, without waiting: :meth:`wait_closed` does that."""
        self._closing = True
        self.push()

    def write_eof(self) -> None:
        """As :meth:`close`."""
        self.close()

    def is_closing(self) -> bool:
        """Nothing more can be written: it was closed, or nobody reads it any more."""
        return self._closing or not self._stream.takes_stdin

    async def wait_closed(self) -> None:
        """Wait until the end of input was sent. It need not have been closed before: as :meth:`aclose`."""
        await self.aclose()

    async def catch_up(self) -> None:
        """Send what was written as far as the process has room. Waits for the agent only, never for the process."""
        while self._stream.takes_stdin and not self._turn.locked():
            if self._written and self._stream.stdin_room:
                async with self._turn:
                    self._sent(await self._stream.send_some(self._next()))
            elif self._closing and not self._written:
                await self._stream.close_stdin()
            else:
                return

    async def _send_some(self, view: memoryview) -> int:
        if not self._stream.stdin_room:
            # The news of room come between those of output, of which no more comes than there is room for here.
            await self._source.advance(lambda: self._stream.stdin_room > 0)
            return 0
        async with self._running.explained():
            return await self._stream.send_some(view)

    def _next(self) -> memoryview:
        return memoryview(bytes(self._written[:LONGEST_PIECE]))

    def _sent(self, size: int) -> None:
        del self._written[:size]

    def push(self) -> None:
        """Send what was written as far as it goes at once, unless another task is at it."""
        if not self._stream.takes_stdin:
            self._written.clear()
        while self._written and not self._turn.locked() and (size := self._stream.send_ready(self._next())):
            self._sent(size)
        if self._closing and not self._written:
            self._stream.close_ready()
