"""What the guest says of files, as values."""

from __future__ import annotations

import stat
from pathlib import PurePosixPath

from pykata.errors import AgentProtocolError
from pykata.files.paths import text
from pykata.files.v1 import Attributes
from pykata.files.values import KINDS, FileEntry, FileStat

MAX_NAME = 4096


def file_stat(said: Attributes) -> FileStat:
    """A file's attributes."""
    kind = KINDS.get(stat.S_IFMT(said.mode), "unknown")
    return FileStat(
        kind=kind, mode=stat.S_IMODE(said.mode), uid=said.uid, gid=said.gid, size=said.size, mtime_ns=said.mtime_ns,
        inode=said.inode, links=said.links, target=text(said.target) if kind == "symlink" else None,
    )  # fmt: skip


def file_entry(directory: PurePosixPath, said: Attributes) -> FileEntry:
    """A file in a directory. Its name is checked to be one: nobody's loop shall walk out of the directory."""
    name = said.name
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name or len(name) > MAX_NAME:
        raise AgentProtocolError("the guest listed a file by a name that none can have")
    return FileEntry(directory / text(name), file_stat(said))
