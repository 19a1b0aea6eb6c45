"""A layer of any number of files as a stream, and how much memory merging it takes: ``python -m tests.large_layer``."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from attrs import evolve

from pykata.images.entry import Entry, Kind
from pykata.images.layer import Layer
from pykata.images.layers import write_layers
from pykata.images.limits import DEFAULT_LIMITS
from pykata.images.tar_writer import END, header, padding

FOLDER = 500        # files


class Stream(io.RawIOBase):
    """What a generator gives, as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        return next(self._chunks, b"")


def tar_chunks(count: int, size: int = 10, block: bytes = b"") -> Iterator[bytes]:
    """A tar of ``count`` files of ``size`` bytes each, which are ``block`` again and again or the file's number."""
    for start in range(0, count, FOLDER):
        folder = b"usr/share/some/package-%06d" % (start // FOLDER)
        parts = [header(Entry(folder, Kind.DIRECTORY, 0o755))]
        for number in range(start, min(start + FOLDER, count)):
            path = b"%s/a-file-of-it-%07d" % (folder, number)
            parts.append(header(Entry(path, Kind.FILE, mtime=number, size=size, stored=size)))
            if block:
                yield b"".join(parts)
                yield from (block[:size - at] for at in range(0, size, len(block)))
                parts = [padding(size)]
            else:
                parts += (b"%0*d" % (size, number), padding(size))
        yield b"".join(parts)
    yield END


def layer(count: int) -> Layer:
    return Layer(f"{count} files", lambda: cast(IO[bytes], Stream(tar_chunks(count))))


class Sink(io.RawIOBase):
    """Counts what is written."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        size = len(cast(bytes, data))
        self.size += size
        return size


def peak() -> int:
    """The most memory that this process has had, in bytes (proc(5), VmHWM)."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(memory: int, counts: list[int]) -> None:
    """Merge layers of so many files, one after the other; print the peak after each."""
    for count in counts:
        sink = Sink()
        write_layers([layer(count)], evolve(DEFAULT_LIMITS, memory=memory), cast(IO[bytes], sink))
        assert sink.size > count * 1024
        print(peak(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(count) for count in sys.argv[2:]])
