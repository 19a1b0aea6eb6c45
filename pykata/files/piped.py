"""What comes from a guest through a pipe, for a thread that writes it to files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from pykata.images.stream import CHUNK, Reader, StreamError


class Piped(Reader):
    """Reads a pipe. What is copied to a file goes there from the pipe, without passing through this process.

    The thread waits for what comes, so the other end has to be closed in the end, whatever happens.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        super().__init__(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """All that comes, unless it is read otherwise."""
        while chunk := os.read(self._pipe, CHUNK):
            yield chunk

    def copy(self, count: int, descriptor: int) -> None:
        have = min(count, len(self._view))
        super().copy(have, descriptor)
        count -= have
        while count:
            try:
                moved = os.splice(self._pipe, descriptor, min(count, CHUNK))
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                super().copy(count, descriptor)     # its file system can't
                return
            if not moved:
                raise StreamError(f"truncated: {count} bytes more should follow")
            self._taken += moved
            count -= moved
