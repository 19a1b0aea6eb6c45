"""A tar that is read in place, as a store of an image's files."""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, cast

from attrs import frozen

from pykata.errors import ImageCorruptError, ImageUnsupportedError, printable
from pykata.images.compression import compression_of
from pykata.images.entry import BadEntryError, Kind
from pykata.images.store import open_file
from pykata.images.stream import CHUNK, StreamError
from pykata.images.tar_reader import TarReader

MAX_MEMBERS = 100_000
MAX_LINKS = 8           # old Docker saved a layer that two images share once, with symlinks to it


@frozen
class Archive:
    """A tar that isn't compressed; ``members`` says where in it a file is, as offset and size, or what it links to."""

    path: Path
    members: Mapping[str, tuple[int, int] | str]

    def open(self, name: str) -> IO[bytes]:
        member: tuple[int, int] | str | None = posixpath.normpath(name)
        for _ in range(MAX_LINKS):
            if not isinstance(member, str):
                break
            member = self.members.get(member)
        if member is None or isinstance(member, str):
            raise FileNotFoundError(f"{self.path} has no {name}")
        file = open_file(self.path)
        file.seek(member[0])
        return cast(IO[bytes], _Member(file, member[1]))


class _Member(io.RawIOBase):
    """A file in an archive, read once from its start."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def open_archive(path: Path, file: IO[bytes]) -> Archive:
    compression = compression_of(file.read(10))
    if compression != "plain":
        raise ImageUnsupportedError(f"{path} is compressed with {compression}", hint="uncompress it first")
    source = _FileReader(file)
    members: dict[str, tuple[int, int] | str] = {}
    try:
        for entry in TarReader(source):
            name = entry.path.decode("utf-8", "surrogateescape")
            if entry.kind is Kind.FILE and entry.extents is None:
                members[name] = (entry.offset, entry.stored)
            elif entry.kind is Kind.HARDLINK:
                members[name] = entry.link.decode("utf-8", "surrogateescape")
            elif entry.kind is Kind.SYMLINK:
                target = entry.link.decode("utf-8", "surrogateescape")
                members[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
            if len(members) > MAX_MEMBERS:
                raise ImageCorruptError(f"{path} has more than {MAX_MEMBERS} files")
    except (StreamError, BadEntryError) as exc:
        where = f": entry {printable(exc.path)!r}" if isinstance(exc, BadEntryError) and exc.path else ""
        raise ImageCorruptError(f"{path} is not a tar that can be read{where}: {exc}") from exc
    return Archive(path, members)


class _FileReader:
    """What a TarReader reads from; it seeks over what it isn't asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.position = 0

    def pieces(self, count: int) -> Iterator[memoryview]:
        while count:
            data = self.read(min(count, CHUNK))
            count -= len(data)
            yield memoryview(data)

    def read(self, count: int) -> bytes:
        self._file.seek(self.position)
        data = self._file.read(count)
        if len(data) != count:
            raise StreamError(f"truncated: {count - len(data)} bytes more should follow")
        self.position += count
        return data

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > self._size:
            raise StreamError(f"truncated: {self.position - self._size} bytes more should follow")

    def at_end(self) -> bool:
        return self.position >= self._size
