"""A command in progress: its stdio and its end, over one Run call."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from attrs import define, frozen

from pykata.agent import bulk
from pykata.agent.bulk import WINDOW as BULK_WINDOW
from pykata.agent.bulk import BulkQueue, Name
from pykata.agent.bulk import Stderr as Stderr
from pykata.agent.bulk import Stdout as Stdout
from pykata.agent.news import news
from pykata.agent.staging import AHEAD, MUCH, Piece, Staging
from pykata.agent.staging import PIECE as STAGED
from pykata.agent.stream import PREFIX, STDIN_TAG, Stream, frame, varint
from pykata.agent.typed import decoded
from pykata.agent.v1 import Ended as EndedMessage
from pykata.agent.v1 import RunRequest, RunResponse, Start
from pykata.agent.v1 import Window as WindowMessage
from pykata.errors import AgentTimeoutError

PIECE = 64 * 1024               # the most bytes of stdio in one message: agent.proto
STDIN_WINDOW = 64 * 1024        # bytes of stdin that may be sent at first: agent.proto, Start.window
MAX_WINDOW = 2**31              # bytes; no agent can be owed more
MAX_ANSWER = PIECE + 64         # bytes of a RunResponse
WINDOW_SIZE = PREFIX + 16       # the most bytes of a message that lets the agent send more
STDOUT_TAG, STDERR_TAG = 0x12, 0x1A     # fields 2 and 3, length-delimited
STDIN_OVERHEAD = PREFIX + 4     # bytes around a piece of stdin: gRPC's prefix, the tag, the length


@frozen
class Exited:
    """The process has ended and everything it wrote has been yielded. ``exit_code`` is 128 + ``signal`` after one."""

    exit_code: int
    signal: int = 0
    oom_killed: bool = False
    oom_kills: int = 0


@frozen
class Ended:
    """Nothing more comes of these streams, although the process hasn't ended or the other one isn't drained."""

    stdout: bool = False
    stderr: bool = False


@frozen
class Room:
    """More may be sent to the process's standard input, by ``size`` bytes."""

    size: int


OutputEvent = Stdout | Stderr | Exited | Ended | Room


@define
class Credit:
    """What the agent may still send of one stream, and what it is owed for bytes that were taken."""

    left: int
    size: int               # what it has when nothing is owed
    owed: int = 0
    over: bool = False


class RunStream:
    """A running command. Iterate over it for :class:`Stdout`, :class:`Stderr`, :class:`Ended`, :class:`Room` and, last,
    one :class:`Exited`.

    Nothing is lost when an await is cancelled: the next one goes on where it was. At most one task may read, and at
    most one may write. When ``start.window`` isn't 0, whoever reads says by :meth:`took` what was consumed.
    """

    def __init__(self, stream: Stream, start: Start, timeout: float) -> None:
        self._stream = stream
        self._timeout = timeout
        self._pid: int | None = None
        self._exited = False
        self._window = start.window
        self._stdin_closed = start.stdin_closed
        self._stdin_window = bulk.STDIN_WINDOW if start.bulk else STDIN_WINDOW
        self._lingers = start.lingers
        self._stdin_in_bulk: bool | None = None if start.bulk else False
        self._stdin_sent = 0            # bytes
        self._stdin_taken = 0           # ... and how many of them the agent has said that the process has
        self._stages = False            # by the way beside the port
        self._staged: deque[tuple[int, Piece]] = deque()        # and how much was sent when it was
        self._staged_size = 0           # bytes of these
        self._credits: dict[Name, Credit] = {name: Credit(start.window, start.window) for name in ("stdout", "stderr")}
        self._bulk = BulkQueue(self._spend, self.took)
        if start.bulk:
            stream.bulk = self._bulk

    async def started(self) -> int:
        """Wait until the process runs: its id in the container.

        Raises AgentRefusedError, AgentTimeoutError, AgentLostError, AgentProtocolError.
        """
        if self._pid is None and self._stream.is_gone:
            self._pid = await self._take_start()        # all is here: nothing is waited for
        if self._pid is None:
            with anyio.move_on_after(self._timeout):
                self._pid = await self._take_start()
        if self._pid is None:
            raise AgentTimeoutError(f"the agent didn't start the process within {self._timeout:g} s")
        return self._pid

    async def _take_start(self) -> int:
        response = await self._receive()
        if not isinstance(response, RunResponse) or response.started is None:
            self._stream.broken("sent something else before it said that the process has started")
        if response.started.pid < 0:
            self._stream.broken("sent a negative process id")
        return response.started.pid

    @property
    def gone(self) -> bool:
        """The process takes no more input; what it said before its end may still be there to be read."""
        return self._stream.is_gone

    def __aiter__(self) -> RunStream:
        return self

    async def __anext__(self) -> OutputEvent:
        await self.started()
        if self._exited:
            raise StopAsyncIteration
        self._pay()
        while isinstance(event := await self._receive(), RunResponse):
            if event.bulk is None:
                return self._news(event)
            self._begin_bulk(event.bulk)
        return event

    def took(self, name: Name, size: int) -> None:
        """So much of a stream was consumed: the agent may send as much again. Never waits."""
        self._credits[name].owed += size
        self._pay()

    @contextmanager
    def diverted(self, pipe: int) -> Iterator[None]:
        """While this lasts, what comes of stdout may go to this pipe, which never waits, rather than be an event.

        Whoever reads the events writes to the pipe what is one of stdout, before the next is asked for.
        """
        self._bulk.divert(pipe)
        try:
            yield
        finally:
            self._bulk.divert(None)

    def _spend(self, name: Name, size: int) -> None:
        credit = self._credits[name]
        if credit.over:
            self._stream.broken(f"sent something of {name} after its end")
        if self._window:
            credit.left -= size
            if credit.left < 0:
                self._stream.broken(f"sent {-credit.left} bytes of {name} that it wasn't allowed")

    def _pay(self) -> None:
        """Tell the agent what more it may send, when it is worth a message."""
        stdout, stderr = self._credits["stdout"], self._credits["stderr"]
        if self._exited or not self._window or (stdout.owed < stdout.size // 2 and stderr.owed < stderr.size // 2):
            return
        if self._stream.room_now() < WINDOW_SIZE:
            return      # an agent that doesn't read: tried again when something is taken or comes
        more = WindowMessage(stdout=stdout.owed, stderr=stderr.owed)
        self._stream.send_now(frame(bytes(RunRequest(window=more))))
        for credit in (stdout, stderr):
            credit.left += credit.owed
            credit.owed = 0

    def _begin_bulk(self, which: EndedMessage) -> None:
        """The rest of a stream comes in bulk frames: it may have more under way."""
        for name, credit in self._credits.items():
            if not getattr(which, name):
                continue
            if self._stream.bulk is None or credit.over or not self._bulk.begin(name):
                self._stream.broken(f"sends {name} in bulk, which nobody asked for")
            more = max(BULK_WINDOW - credit.size, 0)
            credit.size += more
            credit.owed += more
        self._pay()

    def _news(self, news: RunResponse) -> Exited | Ended | Room:
        if news.exited is not None:
            if not self._bulk.is_empty:
                self._stream.broken("said that the process has ended before the last of its output")
            return self._take_exit(news)
        if news.ended is not None:
            for name in ("stdout", "stderr"):
                self._credits[name].over |= getattr(news.ended, name)
            return Ended(news.ended.stdout, news.ended.stderr)
        if news.stdin_window is None:
            self._stream.broken("said twice that the process has started, or sent an empty answer")
        self._stdin_taken += news.stdin_window
        while self._staged and self._staged[0][0] <= self._stdin_taken:
            _, piece = self._staged.popleft()
            self._staged_size -= piece.size
            piece.was_read()
        if not self._window or self._stdin_room > MAX_WINDOW:
            self._stream.broken("opened the window of stdin too far")
        return Room(news.stdin_window)

    def _take_exit(self, news: RunResponse) -> Exited:
        end = news.exited
        assert end is not None
        possible = 0 <= end.exit_code <= 255 if end.signal == 0 else end.exit_code == 128 + end.signal
        if not possible or not 0 <= end.signal <= 64:
            self._stream.broken(f"sent an exit code that can't be: {end.exit_code}, signal {end.signal}")
        self._exited = True
        return Exited(end.exit_code, end.signal, end.oom_killed, end.oom_kills)

    async def finished(self, timeout: float = 30.0) -> None:
        """After :class:`Exited`: wait until the agent has ended the call, so that a container it made is gone too."""
        if self._stream.is_gone:
            return await self._take_end()
        with anyio.move_on_after(timeout):
            if self._lingers:
                await self._stream.send(bytes(RunRequest(remove=True)))
            return await self._take_end()
        raise AgentTimeoutError(f"the agent didn't finish the call within {timeout:g} s")

    async def _take_end(self) -> None:
        if await self._stream.receive(MAX_ANSWER) is not None:
            self._stream.broken("sent something after the end of the process")
        self._stream.raise_for_status()

    async def send_stdin(self, data: bytes) -> None:
        """Send all of ``data``, waiting as long as the process doesn't read; for a command without windows.

        It is no error when the process has closed its stdin or has ended. When this is cancelled, the data may have
        been sent in part.
        """
        view = memoryview(data)
        while view and (sent := await self.send_some(view)):
            view = view[sent:]

    async def send_some(self, data: memoryview) -> int:
        """Send as much of ``data`` as the process has room for; 0 when it has none, or nobody reads it any more."""
        if not self._allowed(data):
            return 0
        if self._in_bulk():
            await self._stream.writable()
        else:
            await self._stream.room(STDIN_OVERHEAD + 1)
        return self.send_ready(data)

    def send_ready(self, data: memoryview) -> int:
        """Send as much of ``data`` as goes without waiting, at most what the process has room for."""
        piece = data[: self._allowed(data)]
        if not piece:
            return 0
        if self._in_bulk():
            if sent := self._stage(data):
                return sent
            if not self._stream.send_bulk(bulk.STDIN, piece):
                return 0
        else:
            piece = piece[: max(self._stream.room_now() - STDIN_OVERHEAD, 0)]
            if not piece:
                return 0
            # Written whole or not at all: a message that was half sent when a cancellation came couldn't be mended.
            self._stream.send_now(frame(bytes((STDIN_TAG,)) + varint(len(piece)) + piece))
        self._stdin_sent += len(piece)
        return len(piece)

    @property
    def _stdin_room(self) -> int:
        """Bytes that the agent takes by the port, and keeps until the process reads. What is staged doesn't count."""
        if not self._window:
            return self._stdin_window
        return self._stdin_window - (self._stdin_sent - self._stdin_taken) + self._waits_staged

    @property
    def _waits_staged(self) -> int:
        """Bytes that are beside the port, for all that is known."""
        if not self._staged:
            return 0
        end, first = self._staged[0]
        return self._staged_size - max(self._stdin_taken - (end - first.size), 0)

    def _stage(self, data: memoryview) -> int:
        """Send as much as goes beside the port."""
        if (staging := self._stream.staging) is None or self._stdin_sent < MUCH or self._stream.is_gone:
            return 0
        if not self._stages:
            self._stages = True
            staging.join()
        if not staging.is_open:
            staging.want()
        if not self._may_stage(staging) or (piece := staging.send(self._stream.bulk_id, data)) is None:
            return 0
        self._stdin_sent += piece.size
        self._staged_size += piece.size
        self._staged.append((self._stdin_sent, piece))
        return piece.size

    def _may_stage(self, staging: Staging) -> bool:
        return staging.has_room and self._waits_staged + STAGED <= AHEAD

    def leave(self) -> None:
        """The call is over."""
        if self._stages and (staging := self._stream.staging):
            self._stages = False
            staging.leave([piece for _, piece in self._staged])

    async def left(self) -> None:
        """What the call had beside the port, if it was the last one, has been given back."""
        if staging := self._stream.staging:
            await staging.left()

    def _allowed(self, data: memoryview) -> int:
        return 0 if self._stdin_closed else min(PIECE, len(data), self._stdin_room)

    def _in_bulk(self) -> bool:
        if self._stdin_in_bulk is None:
            # The agent knows where to once the process runs. What began by gRPC goes on so, or would be overtaken.
            self._stdin_in_bulk = self._pid is not None
        return self._stdin_in_bulk

    @property
    def takes_stdin(self) -> bool:
        """Somebody may still read its stdin: it wasn't closed, nor has the command ended."""
        return not self._stdin_closed and not self._exited and not self._stream.is_gone

    @property
    def stdin_room(self) -> int:
        """Bytes of stdin that are better sent before a :class:`Room` comes."""
        staging = self._stream.staging
        waits = staging and staging.is_open and self._stdin_sent >= MUCH and not self._may_stage(staging)
        if waits and self._stdin_sent - self._stdin_taken >= bulk.STDIN_SAID:
            return 0        # there will be a piece: the agent will say that so much was taken
        return self._stdin_room

    async def close_stdin(self) -> None:
        """The process reads the end of its stdin after what was sent before. Can be repeated."""
        if not self._stdin_closed and await self._stream.room(STDIN_OVERHEAD):
            self.close_ready()

    def close_ready(self) -> None:
        """The same, unless one would have to wait for it."""
        if not self._stdin_closed and self._stream.room_now() >= STDIN_OVERHEAD:
            self._stdin_closed = True
            # With windows there is more to be said: the stream stays open.
            self._stream.send_now(frame(bytes(RunRequest(stdin_closed=True))), end=not self._window)

    async def _receive(self) -> Stdout | Stderr | RunResponse:
        data = await self._stream.receive_any(MAX_ANSWER)
        if isinstance(data, Stdout | Stderr):
            return data
        if data is None:
            self._stream.raise_for_status()
            self._stream.broken("ended the call without saying how the process ended")
        event = stdio(data)
        if event is None:
            try:
                known = news(data)
                response = decoded(RunResponse, data) if known is None else known
            except ValueError as exc:
                self._stream.broken(f"sent an answer to Run that {exc}")
            if response.stdout is not None:
                event = Stdout(response.stdout)
            elif response.stderr is not None:
                event = Stderr(response.stderr)
            else:
                return response
        if not event.data or len(event.data) > PIECE:
            self._stream.broken(f"sent {len(event.data)} bytes of output at once")
        name: Name = "stdout" if isinstance(event, Stdout) else "stderr"
        if self._bulk.has_begun(name):
            self._stream.broken(f"sent {name} by gRPC after it had begun to send it in bulk")
        self._spend(name, len(event.data))
        return event


def stdio(data: bytes) -> Stdout | Stderr | None:
    """A RunResponse that is nothing but output, the frequent case, decoded without the generic decoder."""
    if not data or data[0] not in (STDOUT_TAG, STDERR_TAG):
        return None
    size, at = 0, 1
    for at in range(1, min(4, len(data))):
        size |= (data[at] & 0x7F) << 7 * (at - 1)
        if data[at] < 0x80:
            break
    if at + 1 + size != len(data):
        return None
    return Stdout(data[at + 1 :]) if data[0] == STDOUT_TAG else Stderr(data[at + 1 :])
