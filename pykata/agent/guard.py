"""Looks at HTTP/2 frames before anything parses them.

h2 holds a frame in memory until all of it is there, answers every PING and SETTINGS, and has been seen to raise
AssertionError and NotImplementedError for frames that nobody uses. The agent is on the far side of the trust boundary,
so this lets through only the kinds of frame that an agent needs, in the sizes that it needs, and only as many of those
that cost the host work without moving data as an honest agent would ever send.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pykata.agent import bulk
from pykata.errors import AgentProtocolError

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9

MAX_FRAME = 128 * 1024          # announced as SETTINGS_MAX_FRAME_SIZE: a 64 KiB message of stdio fits into one frame
MAX_HEADERS = 32 * 1024         # bytes of one header block, with its CONTINUATION frames

# The most bytes in a frame of each kind. What isn't here (PRIORITY, PUSH_PROMISE, ALTSVC, extensions) isn't allowed.
LONGEST = {
    DATA: MAX_FRAME,
    HEADERS: MAX_HEADERS,
    CONTINUATION: MAX_HEADERS,
    RST_STREAM: 4,
    SETTINGS: 600,              # 100 settings; there are seven
    PING: 8,
    GOAWAY: 4096,
    WINDOW_UPDATE: 4,
    bulk.KIND: bulk.LONGEST,
}
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
PADDED, PRIORITY = 0x8, 0x20
EARLY = 2**31 - 1               # the number of a Run that comes ahead of HTTP/2
HEADER_SIZE = 9                 # of a frame: RFC 9113, section 4.1

# A token bucket for frames that move no data. The bucket holds what an honest agent may send at once, and is filled
# by time, by streams that the host opens and by data in either direction (a WINDOW_UPDATE follows the data it is for).
BURST = 2000.0
PER_SECOND = 100.0
PER_STREAM = 8.0
BYTES_PER_TOKEN = 1024

# Of a stream that was reset, data may still be under way: as much as its window allows. So many resets are remembered.
RESETS = 4096


class FrameGuard:
    """Reads along with the bytes of one connection, and raises AgentProtocolError at the first that may not pass."""

    def __init__(
        self, take_bulk: Callable[[int, int, bytes], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._take_bulk = take_bulk
        self._bulk: tuple[int, int] | None = None       # stream and flag of the current frame, if that is one of bulk
        self._clock = clock
        self._tokens = BURST
        self._refilled = clock()
        self._header = bytearray()      # of a frame that arrived in pieces
        self._payload = 0               # bytes of the current frame's payload that are still to come
        self._first = True
        self._block = 0                 # bytes of the header block that is open
        self._open: set[int] = set()    # streams that the agent may send data in
        self._reset: dict[int, int] = {}        # stream -> bytes of data that may still come in it
        self._staging = 0               # answers about the disk beside the port that may come
        self._asked: set[int] = set()           # short commands that the agent may answer
        self._left: dict[int, None] = {}        # ... though nobody wants the answer any more

    def credit(self, tokens: float) -> None:
        """The host did something that gives the agent reason to send ``tokens`` more frames."""
        self._tokens = min(BURST, self._tokens + tokens)

    def stream_opened(self, stream: int) -> None:
        """The host has opened a stream."""
        self._open.add(stream)
        self.credit(PER_STREAM)

    def stream_reset(self, stream: int, window: int) -> None:
        """The host has reset a stream; up to ``window`` bytes may be under way."""
        if stream in self._open:
            self._open.discard(stream)
            self._reset[stream] = window
            if len(self._reset) > RESETS:
                del self._reset[next(iter(self._reset))]

    def stream_closed(self, stream: int) -> None:
        """Nothing more may come in a stream."""
        self._open.discard(stream)

    def command_asked(self, number: int) -> None:
        """The host has sent a short command."""
        self._asked.add(number)

    def staging_asked(self) -> None:
        """The host has asked for something to be done with the disk beside the port."""
        self._staging += 1

    def command_left(self, number: int) -> None:
        """The host doesn't wait for the answer any more, or has it; one may be under way."""
        if number in self._asked:
            self._asked.discard(number)
            self._left[number] = None
            if len(self._left) > RESETS:
                del self._left[next(iter(self._left))]

    @property
    def is_inside(self) -> bool:
        """Some of the current frame's payload is still to come."""
        return self._payload > 0

    @property
    def pending(self) -> tuple[bytes, int]:
        """What has come of a frame whose header isn't complete, and how much of another's payload is still to come."""
        return bytes(self._header), self._payload

    def take_bulk(self, data: memoryview) -> int:
        """Take what belongs to a bulk frame that has begun; how much that is."""
        if self._bulk is None or not self._payload:
            return 0
        step = min(self._payload, len(data))
        self.took_bulk(bytes(data[:step]))
        return step

    @property
    def bulk(self) -> tuple[int, int]:
        """The stream and the flags of the bulk frame that has begun."""
        assert self._bulk is not None
        return self._bulk

    @property
    def bulk_left(self) -> int:
        """How much is still to come of the bulk frame that has begun; 0: none has."""
        return 0 if self._bulk is None else self._payload

    def took_bulk(self, data: bytes) -> None:
        """This has come of it."""
        self._payload -= len(data)
        self._take_bulk(*self.bulk, data)

    def passed_bulk(self, size: int) -> None:
        """So much of it has gone another way."""
        self._payload -= size

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """Check the next bytes from the agent. Returns what of them is HTTP/2, and how many frames began in them."""
        at, start, end, frames = 0, 0, len(data), 0
        http2: list[bytes] = []
        while at < end:
            if self._payload:
                if self._bulk is not None:
                    start = at = at + self.take_bulk(memoryview(data)[at:])
                else:
                    step = min(self._payload, end - at)
                    self._payload -= step
                    at += step
                continue
            begin = at
            if self._header or end - at < HEADER_SIZE:
                step = HEADER_SIZE - len(self._header)
                self._header += data[at : at + step]
                at += step
                http2.append(data[start:begin])     # nobody knows yet what the header is one of
                start = at
                if len(self._header) < HEADER_SIZE:
                    break
                header = bytes(self._header)
                self._header.clear()
                if header[3] != bulk.KIND:
                    http2.append(header)
            else:
                header = data[at : at + HEADER_SIZE]
                at += HEADER_SIZE
                if header[3] == bulk.KIND:
                    http2.append(data[start:begin])
                    start = at
            length, stream = int.from_bytes(header[:3]), int.from_bytes(header[5:]) & 0x7FFFFFFF
            self._check(length, header[3], header[4], stream)
            self._bulk = (stream, header[4]) if header[3] == bulk.KIND else None
            self._payload = length
            frames += 1
        if not http2 and not start:
            return data, frames
        http2.append(data[start:])
        return b"".join(http2), frames

    def _check(self, length: int, kind: int, flags: int, stream: int) -> None:
        if self._first and (kind != SETTINGS or flags & ACK):
            raise AgentProtocolError("the agent doesn't speak HTTP/2: its first frame isn't SETTINGS")
        self._first = False
        longest = LONGEST.get(kind)
        if longest is None:
            raise AgentProtocolError(f"the agent sent an HTTP/2 frame of a kind that isn't allowed: {kind:#04x}")
        if length > longest:
            raise AgentProtocolError(f"the agent announced a frame of {length} bytes; kind {kind:#04x} has {longest}")
        if kind == bulk.KIND and flags == bulk.STAGING_DONE:
            self._check_staging(length, stream)
            return
        if kind == bulk.KIND and flags >= bulk.OVER:
            self._check_answer(length, flags, stream)
            return
        is_command = kind == bulk.KIND and (stream in self._open or stream in self._reset)
        if stream and stream % 2 == 0 and not is_command:
            raise AgentProtocolError(f"the agent opened a stream ({stream}); only the host may")
        if (kind == DATA and flags & PADDED) or (kind == HEADERS and flags & (PADDED | PRIORITY)):
            raise AgentProtocolError("the agent sent a padded frame or a priority; agents don't")
        flags_known = len(bulk.FLAGS) + (stream == EARLY)
        if kind == bulk.KIND and (not length or flags >= flags_known):
            raise AgentProtocolError(f"the agent sent a bulk frame of {length} bytes with the flags {flags:#04x}")
        if kind in (DATA, bulk.KIND):
            self._check_data(stream, length)
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            self._open.discard(stream)
            self._reset.pop(stream, None)
        if kind in (DATA, bulk.KIND) and length:
            return      # costs nothing: whoever receives it holds it back by flow control
        if kind in (HEADERS, CONTINUATION):
            self._block += length
            if self._block > MAX_HEADERS:
                raise AgentProtocolError(f"the agent sent more than {MAX_HEADERS} bytes of headers at once")
            if flags & END_HEADERS:
                self._block = 0
        self._spend(kind)

    def _check_answer(self, length: int, flags: int, number: int) -> None:
        if number in self._asked:
            self._asked.discard(number)
        elif number in self._left:
            del self._left[number]
        else:
            raise AgentProtocolError(f"the agent answered a command ({number}) that nobody asked for")
        if not 0 < length <= bulk.LONGEST_ANSWER or flags > bulk.FAILED:
            raise AgentProtocolError(f"the agent answered a command with {length} bytes and the flags {flags:#04x}")

    def _check_staging(self, length: int, stream: int) -> None:
        self._staging -= 1
        if self._staging < 0 or length != 1 or stream:
            raise AgentProtocolError(f"the agent said something of a disk that nobody asked for ({length} bytes)")

    def _check_data(self, stream: int, length: int) -> None:
        if stream in self._open:
            self.credit(length / BYTES_PER_TOKEN)
            if not stream:
                self._open.discard(0)       # the answer to the call ahead of HTTP/2 is one frame
            return
        self._reset[stream] = left = self._reset.get(stream, -1) - length
        if left < 0:
            raise AgentProtocolError(f"the agent sent data in stream {stream}, which isn't open")

    def _spend(self, kind: int) -> None:
        now = self._clock()
        self._tokens = min(BURST, self._tokens + (now - self._refilled) * PER_SECOND) - 1
        self._refilled = now
        if self._tokens < 0:
            raise AgentProtocolError(f"the agent floods the host with HTTP/2 frames (kind {kind:#04x})")
