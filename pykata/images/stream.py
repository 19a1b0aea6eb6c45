"""Bytes of a layer on their way: read in big chunks, counted, hashed, and handed out in the sizes a parser wants."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import IO

CHUNK = 256 * 1024


class StreamError(ValueError):
    """The bytes aren't what they should be: truncated, or not decompressible."""


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write it where the descriptor is. Raises OSError."""
    while data:
        data = data[os.write(descriptor, data):]


class Tally:
    """Passes chunks through, counting and hashing them. ``watch`` is told the count so far, and may raise."""

    def __init__(
        self, chunks: Iterator[bytes], algorithm: str = "", watch: Callable[[int], None] | None = None
    ) -> None:
        self._chunks = chunks
        self._hash = hashlib.new(algorithm) if algorithm else None
        self._watch = watch
        self.size = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        chunk = next(self._chunks)
        self.size += len(chunk)
        if self._hash is not None:
            self._hash.update(chunk)
        if self._watch is not None:
            self._watch(self.size)
        return chunk

    def drain(self) -> None:
        """Read what is left: a digest is about all of it."""
        for _ in self:
            pass

    @property
    def hexdigest(self) -> str:
        return self._hash.hexdigest() if self._hash is not None else ""


class Reader:
    """Hands out a stream of chunks in the sizes that are asked for, without copying the big ones."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._view = memoryview(b"")
        self._taken = 0

    @property
    def position(self) -> int:
        """How many bytes were handed out or skipped."""
        return self._taken - len(self._view)

    def pieces(self, count: int) -> Iterator[memoryview]:
        """The next ``count`` bytes, in as many pieces as they come."""
        while count:
            if self.at_end():
                raise StreamError(f"truncated: {count} bytes more should follow")
            piece = self._view[:count]
            self._view = self._view[len(piece):]
            count -= len(piece)
            yield piece

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes."""
        if len(self._view) >= count:
            piece = bytes(self._view[:count])
            self._view = self._view[count:]
            return piece
        return b"".join(self.pieces(count))

    def copy(self, count: int, descriptor: int) -> None:
        """The next ``count`` bytes, written to a file, where that is."""
        for piece in self.pieces(count):
            write_all(descriptor, piece)

    def skip(self, count: int) -> None:
        if len(self._view) >= count:
            self._view = self._view[count:]
            return
        for _ in self.pieces(count):
            pass

    def at_end(self) -> bool:
        """Whether nothing follows."""
        while not self._view:
            chunk = next(self._chunks, None)
            if chunk is None:
                return True
            self._view = memoryview(chunk)
            self._taken += len(chunk)
        return False


def read_chunks(file: IO[bytes], size: int | None = None) -> Iterator[bytes]:
    """A file's bytes in chunks: the first ``size`` of them where that is given, else all.

    A chunk is empty where the file says that there is nothing yet (None, as :mod:`io` has it).
    """
    left = size
    while left is None or left > 0:
        chunk: bytes | None = file.read(CHUNK if left is None else min(CHUNK, left))
        if chunk is None:
            yield b""
            continue
        if not chunk:
            return
        if left is not None:
            left -= len(chunk)
        yield chunk
