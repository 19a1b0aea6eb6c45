"""What the guest says of files, as values."""

from __future__ import annotations

import dataclasses
import stat
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from betterproto2 import Message

from pykata.errors import AgentProtocolError
from pykata.files.paths import text
from pykata.files.v1 import Attributes
from pykata.files.values import KINDS, FileEntry, FileStat

MAX_NAME = 4096


@cache
def _types(kind: Any) -> tuple[tuple[str, type], ...]:      # Any: mypy doesn't see that messages are dataclasses
    """The fields of a message, and the types of their values: those of the defaults."""
    default = kind()
    types = ((field.name, type(getattr(default, field.name))) for field in dataclasses.fields(kind))
    return tuple((name, int if issubclass(each, int) else each) for name, each in types)


def well_typed(message: Message) -> bool:
    """Whether each field has a value of its type: the decoder takes any for any."""
    for name, kind in _types(type(message)):
        value = getattr(message, name)
        if kind is list:
            if not all(isinstance(each, Message) and well_typed(each) for each in value):
                return False
        elif isinstance(value, Message):
            if not well_typed(value):
                return False
        elif not isinstance(value, kind):
            return False
    return True


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
