"""Calls that come ahead of HTTP/2, on a connection to an agent that was saved together with its machine.

Such an agent executes everything for the first time, and under emulation HTTP/2 and gRPC take it longer than to do what
it is asked for. So Clone, and one Run at a time, come before the preface of the connection, which is sent when
something else has to be. The Run's messages are those of any Run, in bulk frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykata.agent import bulk
from pykata.agent.guard import EARLY
from pykata.agent.stream import MAX_MESSAGE, PIECE, PREFIX, STATUS, Stream
from pykata.errors import AgentRefusedError, printable

if TYPE_CHECKING:
    from pykata.agent.channel import Channel

REQUESTS, CANCEL = EARLY - 2, EARLY - 4     # the numbers of the host's messages, and of what ends the Run early
MOST = 16 * 1024 * 1024         # bytes of messages that wait; what the Run's windows allow is less, byte for byte too
END = 0x80                      # stands where a message has 0, before the status with which the call has ended


class AnswerAhead(Stream):
    """The answer to Clone: a message in a bulk frame."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel, 0)
        self._is_refusal = False

    async def answer(self, limit: int) -> bytes:
        """Wait for it. Raises AgentRefusedError if there is none, and what :meth:`receive` raises."""
        data = await self.receive(limit)
        if data is None:
            self.broken("ended a call without an answer")
        if self._is_refusal:
            raise AgentRefusedError(f"the agent refused: {printable(data, 1000)}", status="INTERNAL")
        self._ended = True
        return data

    def bulk_received(self, flag: int, data: bytes) -> None:
        self._is_refusal = bool(flag)
        self.data_received(data, 0)


class EarlyStream(Stream):
    """A Run ahead of HTTP/2."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel, EARLY)
        self._status: tuple[str, str] | None = None

    def bulk_received(self, flag: int, data: bytes) -> None:
        if flag == bulk.MESSAGE:
            if len(self._buffer) + len(data) > MOST:
                self.broken(f"sent more than {MOST} bytes of messages that it wasn't allowed to")
            if not self._ended:
                self.data_received(data, 0)
        else:
            super().bulk_received(flag, data)

    def status(self) -> tuple[str, str]:
        if self._status is None:
            self.broken("ended a call without a valid status")
        return self._status

    async def room(self, least: int) -> int:
        await self._channel.writable()
        return self.room_now()

    def room_now(self) -> int:
        # Its windows are those of the Run, which its sender keeps to.
        return 0 if self.is_gone or self._channel.has_failed else PIECE

    def send_now(self, data: bytes | memoryview, *, end: bool = False) -> None:
        for at in range(0, len(data), PIECE):
            self._channel.write(bulk.frame(REQUESTS, 0, data[at : at + PIECE]))

    def close(self) -> None:
        if not self._ended and not self._channel.has_failed:
            self._channel.write(bulk.frame(CANCEL, 0, b"\0"))
        super().close()

    def _take(self, limit: int) -> bytes | None:
        if self._buffer[:1] != bytes((END,)):
            return super()._take(limit)
        size = PREFIX + int.from_bytes(self._buffer[1:PREFIX])
        if size > MAX_MESSAGE:
            self.broken(f"announced a status of {size} bytes")
        if PREFIX <= len(self._buffer) >= size:
            self._end(bytes(self._buffer[PREFIX:]), size - PREFIX)
        return None

    def _end(self, said: bytes, size: int) -> None:
        if len(said) > size or not said or said[0] >= len(STATUS):
            self.broken("ended a call without a valid status")
        self._status = STATUS[said[0]], printable(said[1:4000], 1000)
        self._buffer.clear()
        self._ended = True
