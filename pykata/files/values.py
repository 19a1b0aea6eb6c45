"""What is known of a container's files."""

from __future__ import annotations

import stat
from pathlib import PurePosixPath
from typing import Literal

from attrs import frozen

FileKind = Literal["file", "directory", "symlink", "fifo", "socket", "char", "block", "unknown"]

KINDS: dict[int, FileKind] = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "char", stat.S_IFBLK: "block",
}  # fmt: skip


@frozen
class FileStat:
    """A file as it was when it was looked at. ``mode`` has the permissions only (``0o755``), ``size`` is in bytes.

    ``target`` is where a symlink leads, verbatim; None for everything else.
    """

    kind: FileKind
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    inode: int = 0
    links: int = 1
    target: str | None = None

    def is_file(self) -> bool:
        """It is a regular file."""
        return self.kind == "file"

    def is_dir(self) -> bool:
        """It is a directory."""
        return self.kind == "directory"

    def is_symlink(self) -> bool:
        """It is a symlink."""
        return self.kind == "symlink"


@frozen
class FileEntry:
    """A name in a directory, and what it names; a symlink isn't followed. Bytes that aren't UTF-8 are surrogates."""

    path: PurePosixPath
    stat: FileStat

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name


@frozen
class Transfer:
    """What an upload or a download moved: how many files, directories and links, and how many bytes of content.

    ``skipped`` are the first thousand of what can't be moved: devices, FIFOs and sockets.
    """

    entries: int
    size: int
    skipped: tuple[str, ...] = ()


FileEventKind = Literal["created", "modified", "deleted", "moved", "overflow"]


@frozen
class FileEvent:
    """Something that happened to a file. ``"moved"`` has both names: ``path`` is the old one, ``target`` the new one.

    ``"modified"`` is about the content or the attributes. After ``"overflow"``, whose path is that which is watched,
    events are missing: look at what is there.
    """

    kind: FileEventKind
    path: PurePosixPath
    target: PurePosixPath | None = None
    directory: bool = False


FileChangeKind = Literal["added", "modified", "deleted"]


@frozen
class FileChange:
    """What differs between a container and its image. A file that was written is ``"modified"`` whatever it has now; a
    directory only if its owner or permissions are others. What was in a deleted directory isn't listed."""

    kind: FileChangeKind
    path: PurePosixPath
