"""A tree of the host as a tar, written from a thread."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import IO, cast

from attrs import define, field

from pykata.files.values import Transfer
from pykata.images.entry import Entry, Kind
from pykata.images.layers import Output
from pykata.images.pax import MAX_EXTENTS
from pykata.images.tar_writer import END, header, padding

PIECE = 1024 * 1024     # bytes read or moved at once: a thread may wait for its turn for 5 ms after a system call
SKIPPED = 1000          # names that a Transfer has at most


MUCH = 64 * 1024        # bytes of a file from which on they are moved rather than copied


class Sink:
    """The writing end of a pipe that somebody may close at the other end, which raises BrokenPipeError."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def move(self, file: int, offset: int, length: int) -> int:
        """Have the kernel put what a file has there into the pipe, without a copy, as far as it can; how much."""
        left = length
        while left:
            try:
                moved = os.splice(file, self._descriptor, min(PIECE, left), offset_src=offset + length - left)
            except OSError as exc:
                if exc.errno not in (errno.EINVAL, errno.ENOSYS):
                    raise
                break
            if not moved:
                break
            left -= moved
        return length - left

    def write(self, data: bytes | memoryview) -> int:
        """Write all of it."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        return len(data)


@define
class Packer:
    """Writes one tree."""

    _out: Output
    _sink: Sink
    _first: dict[tuple[int, int], bytes] = field(factory=dict)
    _entries: int = 0
    _size: int = 0
    _skipped: list[str] = field(factory=list)

    def tree(self, top: bytes) -> None:
        """A directory with all that is in it, each directory before its contents."""
        self._head(_entry(Kind.DIRECTORY, b"", os.stat(top)))
        stack = [(top, b"")]
        while stack:
            directory, above = stack.pop()
            with os.scandir(directory) as found:
                names = sorted(entry.name for entry in found)
            for name in names:
                path = above + b"/" + name if above else name
                if self._add(where := os.path.join(directory, name), path):
                    stack.append((where, path))

    def finish(self) -> Transfer:
        """The end of the archive."""
        self._out.write(END)
        self._out.flush()
        return Transfer(self._entries, self._size, tuple(self._skipped))

    def _add(self, where: bytes, path: bytes) -> bool:
        """Write what is there; whether it is a directory."""
        found = os.lstat(where)
        match stat.S_IFMT(found.st_mode):
            case stat.S_IFDIR:
                self._head(_entry(Kind.DIRECTORY, path, found))
                return True
            case stat.S_IFLNK:
                self._head(_entry(Kind.SYMLINK, path, found, link=os.readlink(where)))
            case stat.S_IFREG:
                descriptor = os.open(where, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                with os.fdopen(descriptor, "rb", buffering=0) as file:
                    self.file(cast(IO[bytes], file), path)
            case _:
                if len(self._skipped) < SKIPPED:
                    self._skipped.append(os.fsdecode(path))
        return False

    def file(self, file: IO[bytes], path: bytes) -> None:
        """A regular file that is open."""
        found = os.fstat(file.fileno())
        if found.st_nlink > 1:
            first = self._first.setdefault((found.st_dev, found.st_ino), path)
            if first is not path:
                self._head(_entry(Kind.HARDLINK, path, found, link=first))
                return
        parts = _extents(file.fileno(), found)
        stored = found.st_size if parts is None else sum(length for _, length in parts)
        self._head(_entry(Kind.FILE, path, found, size=found.st_size, stored=stored, extents=parts))
        for offset, length in [(0, found.st_size)] if parts is None else parts:
            self._content(file, offset, length)
        self._out.write(padding(stored))
        self._size += stored

    def _content(self, file: IO[bytes], offset: int, length: int) -> None:
        moved = 0
        if length >= MUCH:
            self._out.flush()
            moved = self._sink.move(file.fileno(), offset, length)
        for piece in _pieces(file, offset + moved, length - moved):
            self._out.write(piece)

    def _head(self, entry: Entry) -> None:
        self._out.write(header(entry, exact=True))
        self._entries += 1


def _packer(descriptor: int) -> Packer:
    sink = Sink(descriptor)
    return Packer(Output(cast(IO[bytes], sink)), sink)


def write_tree(top: bytes, descriptor: int) -> Transfer:
    """Write the tree at ``top`` to a pipe, which is closed at the end. Raises OSError."""
    try:
        packer = _packer(descriptor)
        packer.tree(top)
        return packer.finish()
    finally:
        os.close(descriptor)


def write_file(path: bytes, name: bytes, descriptor: int) -> Transfer:
    """Write one file to a pipe, as ``name``; the pipe is closed at the end. Raises OSError."""
    try:
        packer = _packer(descriptor)
        with open(path, "rb", buffering=0) as file:
            packer.file(cast(IO[bytes], file), name)
        return packer.finish()
    finally:
        os.close(descriptor)


def _entry(
    kind: Kind, path: bytes, found: os.stat_result, *, link: bytes = b"", size: int = 0, stored: int = 0,
    extents: tuple[tuple[int, int], ...] | None = None,
) -> Entry:  # fmt: skip
    seconds, nanoseconds = divmod(found.st_mtime_ns, 10**9)
    return Entry(
        path, kind, mode=stat.S_IMODE(found.st_mode), uid=found.st_uid, gid=found.st_gid, mtime=seconds,
        nanoseconds=nanoseconds, link=link, size=size, stored=stored, extents=extents,
    )  # fmt: skip


def _pieces(file: IO[bytes], offset: int, length: int) -> Iterator[bytes]:
    """Exactly ``length`` bytes: a file that has become shorter meanwhile is filled up with zeros."""
    file.seek(offset)
    while length:
        piece = file.read(min(PIECE, length)) or bytes(min(PIECE, length))
        length -= len(piece)
        yield piece


def _extents(descriptor: int, found: os.stat_result) -> tuple[tuple[int, int], ...] | None:
    """Where a file has data; None if that is everywhere, or if nobody knows."""
    if found.st_blocks * 512 >= found.st_size:
        return None
    parts: list[tuple[int, int]] = []
    at = 0
    while at < found.st_size and len(parts) < MAX_EXTENTS - 1:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = min(os.lseek(descriptor, start, os.SEEK_HOLE), found.st_size)
        except OSError:
            break           # ENXIO: no data after this
        if start >= at:
            break
        parts.append((start, at - start))
    if len(parts) >= MAX_EXTENTS - 1 or parts == [(0, found.st_size)]:
        return None
    return tuple(parts)
