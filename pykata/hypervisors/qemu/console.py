"""What a program or a guest wrote last: bounded, and escaped before anyone sees it."""

from __future__ import annotations

import re

import anyio

from pykata.errors import printable
from pykata.host import PipeReader

SIZE = 64 * 1024        # bytes that are kept
LINE = 1000             # characters of a line that are shown
PANIC = re.compile(rb"^.{0,40}?(Kernel panic - not syncing: .{0,200}?)\r?$", re.MULTILINE)


class Tail:
    """The last bytes that came out of a pipe."""

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._kept = bytearray()

    async def follow(self, pipe: PipeReader) -> None:
        """Read until the other end is closed. Always read: a full pipe would stall who writes."""
        while True:
            try:
                self.add(await pipe.receive(self._size))
            except (anyio.EndOfStream, anyio.ClosedResourceError, OSError):
                return

    def add(self, data: bytes) -> None:
        self._kept += data
        del self._kept[:-self._size]

    def text(self) -> str:
        """The lines that are kept, printable."""
        return "\n".join(printable(line.rstrip(b"\r"), LINE) for line in bytes(self._kept).splitlines())

    def panic(self) -> str | None:
        """Why Linux panicked, if it says so (kernel/panic.c). Ask after it died: any guest can print this."""
        found = PANIC.search(self._kept)
        return printable(found[1]) if found else None
