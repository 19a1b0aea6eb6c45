"""Flow control of one stream, from the side that sends."""

from __future__ import annotations

import math

import anyio


class Allowance:
    """How many bytes may be sent; 0 to begin with means any number."""

    def __init__(self, size: int = 0) -> None:
        self.left: float = size or math.inf
        self._grown = anyio.Event()

    async def take(self, most: int) -> int:
        """Wait until something may be sent, and use up to ``most`` bytes of it; how many."""
        while self.left < 1:
            self._grown = anyio.Event()
            await self._grown.wait()
        size = int(min(self.left, most))
        self.left -= size
        return size

    def grow(self, size: int) -> None:
        """So much more may be sent."""
        self.left += size
        self._grown.set()
