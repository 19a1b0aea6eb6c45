"""What comes from a guest through a pipe, for a thread that writes it to files."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from pykata.images.stream import CHUNK, Reader, StreamError, write_all

PIPE_SIZE = 1024 * 1024


def pipe() -> tuple[int, int]:
    """One that takes much at a time."""
    reader, writer = os.pipe()
    with suppress(PermissionError):     # beyond what this user may have: the size it has will do
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return reader, writer


class Piped(Reader):
    """Reads a pipe. What is copied to a file goes there from the pipe, without passing through this process.

    It goes by way of another, of this thread's own: who writes a file from a pipe keeps that locked as long as the disk
    takes, and the event loop, which fills this one, would have to wait. The thread waits for what comes, so the other
    end has to be closed in the end, whatever happens. Made by :meth:`reading`.
    """

    def __init__(self, source: int, beginning: int, end: int) -> None:
        self._source = source
        self._beginning = beginning
        self._end = end
        super().__init__(self.chunks())

    @classmethod
    @contextmanager
    def reading(cls, source: int) -> Iterator[Self]:
        """The descriptor is closed when the block is left."""
        try:
            end, beginning = pipe()
            try:
                yield cls(source, beginning, end)
            finally:
                os.close(end)
                os.close(beginning)
        finally:
            os.close(source)

    def chunks(self) -> Iterator[bytes]:
        """All that comes, unless it is read otherwise."""
        while chunk := os.read(self._source, CHUNK):
            yield chunk

    def copy(self, count: int, descriptor: int) -> None:
        have = min(count, len(self._view))
        super().copy(have, descriptor)
        count -= have
        while count:
            if not (moved := os.splice(self._source, self._beginning, count)):
                raise StreamError(f"truncated: {count} bytes more should follow")
            self._taken += moved
            count -= moved
            self._write(moved, descriptor)

    def _write(self, count: int, descriptor: int) -> None:
        while count:
            try:
                count -= os.splice(self._end, descriptor, count)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                data = os.read(self._end, count)        # its file system can't
                count -= len(data)
                write_all(descriptor, data)
