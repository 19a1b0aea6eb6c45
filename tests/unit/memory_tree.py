"""A filesystem of fsspec in memory, and a tree of a part of it."""

from __future__ import annotations

from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from pykata.fs.fsspec_tree import FsspecTree


class Memory(MemoryFileSystem):     # type: ignore[misc]
    """One of its own: fsspec's is one for the whole process."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]


def memory(**more: Any) -> tuple[Memory, FsspecTree]:
    fs = Memory()
    fs.pipe({"/top/a": b"content", "/top/d/b": b"below", "/other": b"not for the guest"})
    return fs, FsspecTree(fs, "/top", **({"readonly": False, "buffer": 1 << 20} | more))
