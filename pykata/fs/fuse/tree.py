"""What a server serves: files and directories by their paths, of whoever has them. All of it may block."""

from __future__ import annotations

from typing import Protocol

from attrs import frozen


@frozen
class Stat:
    """Of a file or directory; ``mtime`` in seconds since 1970. ``is_sized`` is whether its size is known: else 0."""

    is_directory: bool
    size: int = 0
    mtime: float = 0.0
    is_sized: bool = True


@frozen
class Room:
    """What may be added, and what of that is left; None: as much as one likes."""

    size: int | None = None
    size_left: int | None = None
    files: int | None = None
    files_left: int | None = None


class File(Protocol):
    """An open file. Its methods are called by one thread at a time."""

    @property
    def is_sized(self) -> bool:
        """Whether its size is known. Where it isn't, the file ends where nothing more can be read."""

    def read(self, offset: int, count: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def truncate(self, size: int) -> None: ...
    def size(self) -> int: ...
    def flush(self) -> None:
        """Hand over what was written."""

    def close(self) -> None:
        """Nothing more is asked of it. Hands over what was written."""


class Tree(Protocol):
    """Paths have no slash at either end, and the root is empty. Methods raise OSError."""

    readonly: bool

    def room(self) -> Room: ...
    def stat(self, path: str) -> Stat: ...
    def list(self, path: str) -> list[tuple[str, Stat]]: ...
    def open(self, path: str, *, write: bool, create: bool, exclusive: bool, truncate: bool) -> File: ...
    def truncate(self, path: str, size: int) -> None: ...
    def mkdir(self, path: str) -> None: ...
    def remove(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def rename(self, old: str, new: str) -> None: ...
