"""Output that comes beside gRPC: the bulk frames of agent.proto, on their way from a connection to a command."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

from attrs import frozen

Name = Literal["stdout", "stderr"]

KIND = 0xB0                     # the type of these frames
LONGEST = 256 * 1024            # bytes of payload
FLAGS: tuple[Name, ...] = ("stdout", "stderr")
SMALL = 4 * 1024                # bytes; pieces that are smaller are kept together
WINDOW = 4 * 1024 * 1024        # bytes of such a stream that the agent may send before more is taken
STAGED = 1                      # the flags of frames to the agent that say where data is
STAGING_DONE = 6                # ... and of its answers
STDIN = 2                       # ... of those with data of stdin
MESSAGE = 2                     # ... and of those with messages of a Run that came ahead of HTTP/2
STDIN_WINDOW = 1024 * 1024      # bytes of stdin that may be sent at first
STDIN_PIECE = 64 * 1024         # bytes of it in one frame
COMMAND, LEAVE = 3, 4           # the flags of frames to the agent: a short command, and nobody wants it any more
OVER, GOES_ON, FAILED = 3, 4, 5         # ... and of its answers
LONGEST_ANSWER = 132 * 1024     # bytes of payload


def frame(stream: int, flag: int, data: bytes | memoryview) -> bytes:
    """A bulk frame."""
    return b"".join((memoryview(data).nbytes.to_bytes(3), bytes((KIND, flag)), stream.to_bytes(4), data))


@frozen
class Stdout:
    """Bytes that the process wrote to its standard output, never empty."""

    data: bytes


@frozen
class Stderr:
    """Bytes that the process wrote to its standard error, never empty."""

    data: bytes


class BulkQueue:
    """What came of a command's streams and wasn't taken yet. ``spend`` raises when more comes than was allowed.

    A frame may overtake the message by which the agent says that it begins with them, so what comes of a stream waits
    for that.
    """

    def __init__(self, spend: Callable[[Name, int], None]) -> None:
        self._spend = spend
        self._pieces: dict[Name, deque[bytes | bytearray]] = {name: deque() for name in FLAGS}
        self._begun: set[Name] = set()

    def put(self, flag: int, data: bytes) -> None:
        """Take in the payload of a frame, or a part of it."""
        name = FLAGS[flag]
        self._spend(name, len(data))
        pieces = self._pieces[name]
        if len(data) >= SMALL:
            pieces.append(data)
        elif pieces and isinstance(last := pieces[-1], bytearray) and len(last) < LONGEST:
            last += data
        else:
            pieces.append(bytearray(data))      # each for itself, a million of one byte would take a hundred of memory

    def begin(self, name: Name) -> bool:
        """The rest of this stream comes this way; False: that was said before."""
        if name in self._begun:
            return False
        self._begun.add(name)
        return True

    def has_begun(self, name: Name) -> bool:
        """Nothing more comes of this stream by gRPC."""
        return name in self._begun

    def take(self) -> Stdout | Stderr | None:
        """The next piece, if there is one."""
        for name in self._begun:
            if pieces := self._pieces[name]:
                data = bytes(pieces.popleft())
                return Stdout(data) if name == "stdout" else Stderr(data)
        return None

    @property
    def is_empty(self) -> bool:
        """Nothing has come that wasn't taken."""
        return not any(self._pieces.values())
