"""One gRPC call: whole messages over one HTTP/2 stream.

The format is gRPC's "PROTOCOL-HTTP2.md": five bytes (a flag for compression, the length), then the message; at the end
trailers with ``grpc-status`` and ``grpc-message``. No await point is ever inside the taking of a message, so a receive
that is cancelled loses nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import quote_from_bytes, unquote_to_bytes

from h2.errors import ErrorCodes

from pykata.agent.bulk import frame as bulk_frame
from pykata.errors import AgentProtocolError, AgentRefusedError, printable

if TYPE_CHECKING:
    from pykata.agent.bulk import BulkQueue, Stderr, Stdout
    from pykata.agent.channel import Channel
    from pykata.agent.staging import Staging

Headers = list[tuple[bytes, bytes]]

MAX_MESSAGE = 4 * 1024 * 1024   # in either direction: agent.proto
PREFIX = 5                      # bytes before a message
STDIN_TAG = 0x12                # of a RunRequest: field 2, length-delimited
PIECE = 64 * 1024               # bytes written at once, between two looks at whether the agent reads

STATUS = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
# PROTOCOL-HTTP2.md, "Errors"; what isn't here is INTERNAL.
STATUS_OF_RESET: dict[int, str] = {
    ErrorCodes.REFUSED_STREAM: "UNAVAILABLE",
    ErrorCodes.CANCEL: "CANCELLED",
    ErrorCodes.ENHANCE_YOUR_CALM: "RESOURCE_EXHAUSTED",
    ErrorCodes.INADEQUATE_SECURITY: "PERMISSION_DENIED",
}


class Stream:
    """A call in progress. Whoever opened it must :meth:`close` it."""

    def __init__(self, channel: Channel, stream_id: int) -> None:
        self.id = stream_id
        self._channel = channel
        self._client_side = bool(channel.h2.config.client_side)
        self._buffer = bytearray()
        self._unacked = 0                       # bytes received for which the agent hasn't got window back yet
        self._headers: dict[bytes, bytes] | None = None
        self._trailers: dict[bytes, bytes] | None = None
        self._ended = False                     # the peer sends nothing more
        self._reset: int | None = None          # the code, when the peer reset the stream
        self._readable = asyncio.Event()
        self._window = asyncio.Event()
        self.bulk_id = stream_id
        """The number of its bulk frames."""
        self.bulk: BulkQueue | None = None
        """Where bulk frames go; None: none may come."""

    # What the channel calls.

    def headers_received(self, headers: Headers) -> None:
        fields = dict(headers)
        if self._headers is not None:
            self._trailers = fields
            return
        self._headers = fields
        if b":status" in fields:                # an answer, not a request
            if fields[b":status"] != b"200":
                raise AgentProtocolError(f"the agent answered with HTTP status {printable(fields[b':status'], 20)}")
            if not fields.get(b"content-type", b"").startswith(b"application/grpc") and b"grpc-status" not in fields:
                raise AgentProtocolError("the agent's answer isn't gRPC")

    def data_received(self, data: bytes, size: int) -> None:
        self._buffer += data
        self._unacked += size
        self._readable.set()

    def bulk_received(self, flag: int, data: bytes) -> None:
        if self.bulk is None:
            self.broken("sent a bulk frame that nobody asked for")
        if not self._ended and self.bulk.put(flag, data):
            self._readable.set()

    def move_bulk(self, flag: int, sock: int, most: int) -> int:
        """Move what can be moved of a bulk frame's payload from the socket; how much that was."""
        return 0 if self.bulk is None or self._ended else self.bulk.move(flag, sock, most)

    def complete(self, messages: bytes, status: int, said: bytes) -> None:
        """All of the call's answer has come otherwise than by HTTP/2, which knows nothing of this stream."""
        self._headers = {}
        self._trailers = {b"grpc-status": b"%d" % status, b"grpc-message": quote_from_bytes(said).encode()}
        self._buffer += messages
        self.ended(None)

    def ended(self, reset: int | None) -> None:
        if self._ended and self._client_side:
            return                              # RST_STREAM(NO_ERROR) after a complete answer: RFC 9113, section 8.1
        self._ended = True
        self._reset = reset
        self.wake()

    def window_changed(self) -> None:
        self._window.set()

    def wake(self) -> None:
        """Something changed that all waiters must see."""
        self._readable.set()
        self._window.set()

    # What callers use.

    async def receive(self, limit: int = MAX_MESSAGE) -> bytes | None:
        """The next message, at most ``limit`` bytes long; None when there is none anymore."""
        while (message := self._take(limit)) is None:
            if self._ended:
                if self._buffer and self._reset is None:
                    self.broken("ended a stream inside a message")
                return None
            self._channel.check()
            self._acknowledge(keep=0)           # the rest of a message that is longer than the window
            self._readable.clear()
            await self._readable.wait()
        return message

    async def receive_any(self, limit: int) -> bytes | Stdout | Stderr | None:
        """As :meth:`receive`, or the next piece that came in bulk frames, which is older."""
        while self.bulk is not None:
            if (piece := self.bulk.take()) is not None:
                return piece
            if (message := self._take(limit)) is not None:
                return message
            if self._ended or self._channel.has_failed:
                break
            self._acknowledge(keep=0)
            self._readable.clear()
            with self.bulk.all_taken():
                await self._readable.wait()
        return await self.receive(limit)

    def raise_for_status(self) -> None:
        """Raises AgentRefusedError unless the call, which must have ended, ended well."""
        if self._reset is not None:
            status = STATUS_OF_RESET.get(self._reset, "INTERNAL")
            raise AgentRefusedError(f"the agent reset the call (HTTP/2 error {self._reset})", status=status)
        status, said = self.status()
        if status != "OK":
            raise AgentRefusedError(f"the agent refused: {said or status}", status=status)

    def status(self) -> tuple[str, str]:
        """The name of the status with which the call ended, and what the agent said to it."""
        fields = self._trailers if self._trailers is not None else self._headers or {}
        raw = fields.get(b"grpc-status")
        if raw is None or not raw.isdigit() or len(raw) > 2 or int(raw) >= len(STATUS):
            self.broken("ended a call without a valid status")
        return STATUS[int(raw)], printable(unquote_to_bytes(fields.get(b"grpc-message", b"")[:4000]), 1000)

    def broken(self, what: str) -> NoReturn:
        """The agent did what the protocol doesn't allow: end the connection, and raise what :meth:`receive` raises."""
        self._channel.fail(AgentProtocolError, f"the agent {what}")
        raise AgentProtocolError(f"the agent {what}")

    async def send(self, message: bytes, *, end: bool = False) -> None:
        """Send one message. Ends early if the peer has ended the call: :meth:`receive` tells how.

        If it is cancelled, part of the message may have been sent, and the stream can only be closed.
        """
        data = memoryview(frame(message))
        while data or end:
            room = await self.room(1 if data else 0)
            if self.is_gone:
                return
            piece = data[: min(room, PIECE)]
            data = data[len(piece) :]
            self.send_now(piece, end=end and not data)
            if not data:
                return

    async def room(self, least: int) -> int:
        """Wait until at least that many bytes may be sent, or the peer has ended the call; how many."""
        while True:
            await self._channel.writable()
            if self.is_gone:
                return 0
            room = self._channel.h2.local_flow_control_window(self.id)
            if room >= least:
                return room
            self._channel.flush()               # the request's headers, which otherwise go with the first message
            self._window.clear()
            await self._window.wait()

    def room_now(self) -> int:
        """How many bytes may be sent, whether or not the agent reads them."""
        gone = self.is_gone or self._channel.has_failed
        return 0 if gone else self._channel.h2.local_flow_control_window(self.id)

    def send_now(self, data: bytes | memoryview, *, end: bool = False) -> None:
        """Send bytes for which there is :meth:`room`. ``end`` promises that they are the last."""
        h2 = self._channel.h2
        size = h2.max_outbound_frame_size
        for at in range(0, len(data), size):
            h2.send_data(self.id, data[at : at + size], end_stream=end and at + size >= len(data))
        if end and not data:
            h2.end_stream(self.id)
        self._channel.flush(len(data))

    async def writable(self) -> None:
        """Wait until the agent has read enough of what was written before."""
        await self._channel.writable()

    def send_bulk(self, flag: int, data: bytes | memoryview) -> bool:
        """Send a bulk frame, whole or not at all, when it is :meth:`writable`. False: nobody takes it anymore."""
        if self.is_gone or self._channel.has_failed:
            return False
        self._channel.write(bulk_frame(self.bulk_id, flag, data))
        return True

    @property
    def staging(self) -> Staging | None:
        """A way beside the port, if there is one."""
        return self._channel.staging

    def bulk_sent(self, data: bytes) -> None:
        """The peer has sent a bulk frame of stdin: it is taken for the message that would say the same."""
        self.data_received(frame(bytes((STDIN_TAG,)) + varint(len(data)) + data), 0)

    @property
    def was_reset(self) -> bool:
        """The peer left the call before its end."""
        return self._reset is not None

    @property
    def is_gone(self) -> bool:
        """Nobody takes what is sent anymore; messages may still be there to be received."""
        return self._reset is not None or (self._ended and self._client_side)

    def close(self) -> None:
        """The caller is done with the call; it is reset if it isn't over. Never waits, never fails.

        Who still waits, or asks once more, is told that the call was cancelled: what had come is forgotten.
        """
        self._channel.close_stream(self, self._unacked)
        self._unacked = 0
        self._buffer.clear()
        self._ended = True
        if self._reset is None:
            self._reset = int(ErrorCodes.CANCEL)
        self.wake()

    def _take(self, limit: int) -> bytes | None:
        have = len(self._buffer)
        if have < PREFIX:
            return None
        if self._buffer[0]:
            self.broken("sent a compressed message; none was asked for")
        size = int.from_bytes(self._buffer[1:PREFIX])
        if size > limit:
            self.broken(f"announced a message of {size} bytes; this call allows {limit}")
        if have < PREFIX + size:
            return None
        with memoryview(self._buffer) as view:
            message = bytes(view[PREFIX : PREFIX + size])
        del self._buffer[: PREFIX + size]
        self._acknowledge(keep=len(self._buffer))
        return message

    def _acknowledge(self, keep: int) -> None:
        size = self._unacked - keep
        if size > 0 and not self._ended and not self._channel.has_failed:
            self._unacked = keep
            self._channel.h2.acknowledge_received_data(size, self.id)
            self._channel.flush()


def frame(message: bytes) -> bytes:
    """A message as gRPC sends it, not compressed."""
    return b"\0" + len(message).to_bytes(4) + message


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
