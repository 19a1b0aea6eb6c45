"""Output that comes beside gRPC: the bulk frames of agent.proto, on their way from a connection to a command."""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from attrs import frozen

Name = Literal["stdout", "stderr"]

KIND = 0xB0                     # the type of these frames
LONGEST = 256 * 1024            # bytes of payload
FLAGS: tuple[Name, ...] = ("stdout", "stderr")
STDOUT = 0                      # the flag of the first
SMALL = 4 * 1024                # bytes; pieces that are smaller are kept together
WINDOW = 4 * 1024 * 1024        # bytes of such a stream that the agent may send before more is taken
STAGED = 1                      # the flags of frames to the agent that say where data is
STAGING_DONE = 6                # ... and of its answers
STDIN = 2                       # ... of those with data of stdin
MESSAGE = 2                     # ... and of those with messages of a Run that came ahead of HTTP/2
STDIN_WINDOW = 1024 * 1024      # bytes of stdin that may be sent at first
STDIN_PIECE = 64 * 1024         # bytes of it in one frame
STDIN_SAID = 512 * 1024         # bytes from which on the agent says that the process has taken them
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
    """What came of a command's streams and wasn't taken yet. ``spend`` raises when more comes than was allowed, and
    ``took`` is told of what went to a pipe instead.

    A frame may overtake the message by which the agent says that it begins with them, so what comes of a stream waits
    for that.
    """

    def __init__(self, spend: Callable[[Name, int], None], took: Callable[[Name, int], None]) -> None:
        self._spend = spend
        self._took = took
        self._pipe: int | None = None       # where stdout goes
        self._all_taken = False
        self._pieces: dict[Name, deque[bytes | bytearray]] = {name: deque() for name in FLAGS}
        self._begun: set[Name] = set()

    def put(self, flag: int, data: bytes) -> bool:
        """Take in the payload of a frame, or a part of it. False: there is nothing to be taken of it."""
        name = FLAGS[flag]
        self._spend(name, len(data))
        if self._flows(flag) and not (data := self._write(data)):
            return False
        pieces = self._pieces[name]
        if len(data) >= SMALL:
            pieces.append(data)
        elif pieces and isinstance(last := pieces[-1], bytearray) and len(last) < LONGEST:
            last += data
        else:
            pieces.append(bytearray(data))      # each for itself, a million of one byte would take a hundred of memory
        return True

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

    def divert(self, pipe: int | None) -> None:
        """Stdout may go to this pipe, which never waits; who takes what comes instead writes it there."""
        self._pipe = pipe

    @contextmanager
    def all_taken(self) -> Iterator[None]:
        """While this lasts, who takes what comes waits for it, and is done with all that came before."""
        self._all_taken = True
        try:
            yield
        finally:
            self._all_taken = False

    def move(self, flag: int, sock: int, most: int) -> int:
        """Move up to so much of a frame's payload from a socket to the pipe of its stream; how much could be.

        Raises BlockingIOError when nothing is there.
        """
        if not self._flows(flag):
            return 0
        assert self._pipe is not None
        try:
            moved = os.splice(sock, self._pipe, most, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        except BlockingIOError:
            if _has_room(self._pipe):
                raise
            return 0
        except OSError:
            return 0        # nobody reads it any more, or it can't be: seen by who receives it instead
        self._spend("stdout", moved)
        self._took("stdout", moved)
        return moved

    def _flows(self, flag: int) -> bool:
        """What comes may go to the pipe at once: all that came before is there."""
        if self._pipe is None or flag != STDOUT or not self._all_taken:
            return False
        return "stdout" in self._begun and not self._pieces["stdout"]

    def _write(self, data: bytes) -> bytes:
        """Write to the pipe what there is room for; returns the rest."""
        assert self._pipe is not None
        try:
            written = os.write(self._pipe, data)
        except OSError:                     # no room, or nobody reads it any more: seen by who takes it
            return data
        self._took("stdout", written)
        return data[written:]

    @property
    def is_empty(self) -> bool:
        """Nothing has come that wasn't taken."""
        return not any(self._pieces.values())


def _has_room(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    return bool(poll.poll(0))
