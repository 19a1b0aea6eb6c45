"""Directories of a filesystem of fsspec that has none of its own, and how things are moved in it."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from glob import has_magic
from typing import Any

from attrs import define, field


@define
class EmptyDirectories:
    """Those that are there for the guest alone. Paths have no slash at either end; several threads may ask.

    Object storage has a directory for as long as something is in it. A guest's are there until it removes them.
    """

    _paths: set[str] = field(factory=set)
    _lock: threading.Lock = field(factory=threading.Lock)

    def __contains__(self, path: str) -> bool:
        return path in self._paths

    def names_in(self, path: str) -> list[str]:
        """Those in a directory."""
        with self._lock:
            return [other.rpartition("/")[2] for other in self._paths if parent(other) == path]

    def add(self, path: str) -> None:
        with self._lock:
            self._paths.add(path)

    def discard(self, path: str) -> None:
        with self._lock:
            self._paths.discard(path)

    def filled(self, path: str) -> None:
        """There is something in this one now, and so the filesystem has it, and those above it."""
        while path:
            self.discard(path)
            path = parent(path)

    def moved(self, old: str, new: str) -> None:
        """What was at a path, and all below it, is at another one."""
        with self._lock:
            those = {path for path in self._paths if is_below(path, old)}
            self._paths = self._paths - those | {new + path[len(old):] for path in those}


def move(fs: Any, old: str, new: str, *, is_directory: bool, is_over: bool) -> None:
    """Move what is at ``old`` to ``new``, by the filesystem's own paths; ``is_over``: there is a file."""
    try:
        _move(fs, old, new, is_directory=is_directory)
    except FileExistsError:         # until now that file was there, whatever else might have been wrong
        if not is_over:
            raise
        fs.rm_file(new)
        _move(fs, old, new, is_directory=is_directory)


def _move(fs: Any, old: str, new: str, *, is_directory: bool) -> None:
    # What fsspec has for who has no mv of its own takes a name with a "*" for all those that are like it, and copies
    # directories as if they were files.
    if has_magic(old) or type(fs).mv is sys.modules["fsspec.spec"].AbstractFileSystem.mv:
        _move_each(fs, old, new, is_directory=is_directory)
    else:
        fs.mv(old, new, recursive=is_directory)


def _move_each(fs: Any, old: str, new: str, *, is_directory: bool) -> None:
    if not is_directory:
        fs.cp_file(old, new)
        fs.rm_file(old)
        return
    fs.mkdir(new, create_parents=False)
    for entry in fs.ls(old, detail=True):
        name = str(entry["name"]).rstrip("/").rpartition("/")[2]
        _move_each(fs, f"{old}/{name}", f"{new}/{name}", is_directory=entry["type"] == "directory")
    with suppress(FileNotFoundError):           # it went with what was in it
        fs.rmdir(old)


def parent(path: str) -> str:
    """The directory that a path is in; the root is empty."""
    return path.rpartition("/")[0]


def is_below(path: str, top: str) -> bool:
    """Whether it is ``top`` or below it."""
    return path == top or path.startswith(f"{top}/")
