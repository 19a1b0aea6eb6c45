"""Pieces of data on their way from a task to a thread, without being copied."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from queue import SimpleQueue

LIMIT = 4 * 1024 * 1024     # bytes that may wait for the thread
OVERHEAD = 64               # bytes that a piece takes beside its data: a million tiny ones aren't nothing


class Handover:
    """The task puts pieces in, and waits while the thread is behind; the thread iterates over them.

    Each of the two counters is written by one side only; whoever stalls looks again after saying so.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: SimpleQueue[bytes] = SimpleQueue()
        self._put = 0
        self._taken = 0
        self._stalled = False
        self._refused = False
        self._room = asyncio.Event()

    async def put(self, piece: bytes) -> bool:
        """Hand on a piece that isn't empty. False: the thread takes no more."""
        while self._is_full() and not self._refused:
            self._room.clear()
            self._stalled = True
            if self._is_full() and not self._refused:
                await self._room.wait()
            self._stalled = False
        self._put += len(piece) + OVERHEAD
        self._pieces.put(piece)
        return not self._refused

    def end(self) -> None:
        """There is nothing more to come. Never waits."""
        self._pieces.put(b"")

    def _is_full(self) -> bool:
        return self._put - self._taken >= LIMIT

    # What the thread calls.

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._pieces.get():
            self._taken += len(piece) + OVERHEAD
            if self._stalled and self._put - self._taken <= LIMIT // 2:
                self._wake()
            yield piece

    def refuse(self) -> None:
        """The thread takes no more."""
        self._refused = True
        self._wake()

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._room.set)
