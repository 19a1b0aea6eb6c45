"""A command in progress: its stdio and its end, over one Run call."""

from __future__ import annotations

import anyio
from attrs import frozen

from pykata.agent.stream import PREFIX, Stream, frame
from pykata.agent.v1 import RunRequest, RunResponse
from pykata.errors import AgentTimeoutError

PIECE = 64 * 1024               # the most bytes of stdio in one message: agent.proto
MAX_ANSWER = PIECE + 64         # bytes of a RunResponse
STDIN_TAG, STDOUT_TAG, STDERR_TAG = 0x12, 0x12, 0x1A    # fields 2, 2 and 3, length-delimited
STDIN_OVERHEAD = PREFIX + 4     # bytes around a piece of stdin: gRPC's prefix, the tag, the length


@frozen
class Stdout:
    """Bytes that the process wrote to its standard output, never empty."""

    data: bytes


@frozen
class Stderr:
    """Bytes that the process wrote to its standard error, never empty."""

    data: bytes


@frozen
class Exited:
    """The process has ended and everything it wrote has been yielded. ``exit_code`` is 128 + ``signal`` after one."""

    exit_code: int
    signal: int = 0
    oom_killed: bool = False


OutputEvent = Stdout | Stderr | Exited


class RunStream:
    """A running command. Iterate over it for :class:`Stdout`, :class:`Stderr` and, last, one :class:`Exited`.

    Nothing is lost when an await is cancelled: the next one goes on where it was. At most one task may read, and at
    most one may write.
    """

    def __init__(self, stream: Stream, timeout: float) -> None:
        self._stream = stream
        self._timeout = timeout
        self._pid: int | None = None
        self._exited = False
        self._stdin_closed = False

    async def started(self) -> int:
        """Wait until the process runs: its id in the container.

        Raises AgentRefusedError, AgentTimeoutError, AgentLostError, AgentProtocolError.
        """
        if self._pid is None:
            with anyio.move_on_after(self._timeout):
                response = await self._receive()
                if not isinstance(response, RunResponse) or response.started is None:
                    self._stream.broken("sent something else before it said that the process has started")
                if response.started.pid < 0:
                    self._stream.broken("sent a negative process id")
                self._pid = response.started.pid
        if self._pid is None:
            raise AgentTimeoutError(f"the agent didn't start the process within {self._timeout:g} s")
        return self._pid

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
        event = await self._receive()
        if not isinstance(event, RunResponse):
            return event
        if event.exited is None:
            self._stream.broken("said twice that the process has started, or sent an empty answer")
        end = event.exited
        possible = 0 <= end.exit_code <= 255 if end.signal == 0 else end.exit_code == 128 + end.signal
        if not possible or not 0 <= end.signal <= 64:
            self._stream.broken(f"sent an exit code that can't be: {end.exit_code}, signal {end.signal}")
        self._exited = True
        return Exited(end.exit_code, end.signal, end.oom_killed)

    async def finished(self, timeout: float = 30.0) -> None:
        """After :class:`Exited`: wait until the agent has ended the call, so that a container it made is gone too."""
        with anyio.move_on_after(timeout):
            if await self._stream.receive(MAX_ANSWER) is not None:
                self._stream.broken("sent something after the end of the process")
            self._stream.raise_for_status()
            return
        raise AgentTimeoutError(f"the agent didn't finish the call within {timeout:g} s")

    async def send_stdin(self, data: bytes) -> None:
        """Send all of ``data``, waiting as long as the process doesn't read.

        It is no error when the process has closed its stdin or has ended. When this is cancelled, the data may have
        been sent in part.
        """
        view = memoryview(data)
        while view and not self._stdin_closed:
            room = await self._stream.room(STDIN_OVERHEAD + 1)
            if not room:
                return
            piece = view[: min(PIECE, room - STDIN_OVERHEAD)]
            # Written whole or not at all: a message that was half sent when a cancellation came couldn't be mended.
            self._stream.send_now(frame(bytes((STDIN_TAG,)) + varint(len(piece)) + piece))
            view = view[len(piece) :]

    async def close_stdin(self) -> None:
        """The process reads the end of its stdin after what was sent before. Can be repeated."""
        if not self._stdin_closed and await self._stream.room(STDIN_OVERHEAD):
            self._stdin_closed = True
            self._stream.send_now(frame(bytes(RunRequest(stdin_closed=True))), end=True)

    async def _receive(self) -> Stdout | Stderr | RunResponse:
        data = await self._stream.receive(MAX_ANSWER)
        if data is None:
            self._stream.raise_for_status()
            self._stream.broken("ended the call without saying how the process ended")
        event = stdio(data)
        if event is None:
            try:
                response = RunResponse.parse(data)
            except Exception:  # the decoder's errors aren't one family
                self._stream.broken("sent an answer to Run that can't be decoded")
            if response.stdout is not None:
                event = Stdout(response.stdout)
            elif response.stderr is not None:
                event = Stderr(response.stderr)
            else:
                return response
        if not event.data or len(event.data) > PIECE:
            self._stream.broken(f"sent {len(event.data)} bytes of output at once")
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


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
