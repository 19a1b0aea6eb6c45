"""What a program or a guest wrote last: bounded, and escaped before anyone sees it."""

from __future__ import annotations

import asyncio
import re

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


class Followed:
    """A pipe that is read into a tail until its other end is closed, or this is. A full one would stall who writes.

    By the event loop: to begin and end two tasks takes a start from a template longer than what they would read.
    """

    def __init__(self, pipe: PipeReader, tail: Tail) -> None:
        self.ended = asyncio.Event()
        self._pipe = pipe
        self._tail = tail
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pipe.fileno(), self._read)

    def close(self) -> None:
        """Read no more. May be called again."""
        if not self.ended.is_set():
            self._loop.remove_reader(self._pipe.fileno())
            self.ended.set()

    def _read(self) -> None:
        try:
            data = self._pipe.receive_nowait(SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._tail.add(data)
        else:
            self.close()
