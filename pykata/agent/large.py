"""Large bulk frames, received past asyncio: a payload goes from the socket right to where it is kept.

asyncio receives into a buffer, from which a frame's payload has to be copied. Where a payload begins and how long it is
is known once its header is here, so header and payload are received each for itself: a payload as the very bytes that
are handed on, or, for a stream that goes to a pipe, without passing through this process at all.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from pykata.agent.guard import HEADER_SIZE, FrameGuard

LARGE = 32 * 1024               # bytes of a payload that are worth it
AT_ONCE = 1024 * 1024           # bytes after which others have their turn


class LargeFrames:
    """The large bulk frames of a connection.

    ``feed`` takes what is no such payload. ``move`` is told the stream and the flags of a frame, the socket, and how
    much of the payload is still to come; it returns how much of that it has moved elsewhere.
    """

    def __init__(
        self, sock: socket.socket, guard: FrameGuard, feed: Callable[[bytes], None],
        move: Callable[[int, int, int, int], int],
    ) -> None:  # fmt: skip
        self._sock = sock
        self._guard = guard
        self._feed = feed
        self._move = move
        self._expected = False

    @property
    def is_next(self) -> bool:
        """What comes next is the rest of such a frame, or, after one, may well be another."""
        return self._expected or self._guard.bulk_left >= LARGE

    def receive(self) -> None:
        """Receive what is here of such frames. Raises AgentProtocolError, and OSError when there is nothing more."""
        taken, left = 0, self._guard.bulk_left
        self._expected = True
        while taken < AT_ONCE:
            if not left:
                if not (header := self._sock.recv(HEADER_SIZE)):
                    return              # the end, of which asyncio hears next
                self._feed(header)
                if self._guard.bulk_left < LARGE:
                    self._expected = False
                    return
            elif moved := self._move(*self._guard.bulk, self._sock.fileno(), left):
                self._guard.passed_bulk(moved)
                taken += moved
            elif data := self._sock.recv(left):
                self._guard.took_bulk(data)
                taken += len(data)
            else:
                return
            left = self._guard.bulk_left
