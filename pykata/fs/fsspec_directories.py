"""Directories of a filesystem of fsspec that has none of its own, and how things are moved in it."""

from __future__ import annotations

import errno
import inspect
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from glob import has_magic
from typing import Any

from attrs import define, field

from pykata.fs.fuse.nodes import is_too_long

MAX_EMPTY = 10_000      # they cost a guest nothing, and us their paths


@define
class EmptyDirectories:
    """Those that are there for the guest alone. Paths have no slash at either end; several threads may ask.

    Object storage has a directory for as long as something is in it. A guest's are there until it removes them.
    """

    _names: dict[str, set[str]] = field(factory=dict)       # by the directory that they are in
    _number: int = 0
    _lock: threading.Lock = field(factory=threading.Lock)

    def __contains__(self, path: str) -> bool:
        top, _, name = path.rpartition("/")
        return name in self._names.get(top, ())

    def names_in(self, path: str) -> list[str]:
        """Those in a directory."""
        with self._lock:
            return list(self._names.get(path, ()))

    def below(self, path: str) -> list[str]:
        """This one, if it is one of them, and all below it."""
        with self._lock:
            return self._below(path)

    def _below(self, path: str) -> list[str]:
        found = [f"{top}/{name}" for top, names in self._names.items() if is_below(top, path) for name in names]
        return [path, *found] if path in self else found

    def add(self, paths: Sequence[str]) -> None:
        """Raises OSError (ENOSPC) if these would be too many, and none of them is added then."""
        with self._lock:
            if self._number + len(paths) > MAX_EMPTY:
                raise OSError(errno.ENOSPC, "too many empty directories")
            for path in paths:
                self._add(path)

    def _add(self, path: str) -> None:
        if path not in self:
            top, _, name = path.rpartition("/")
            self._names.setdefault(top, set()).add(name)
            self._number += 1

    def discard(self, path: str) -> None:
        with self._lock:
            self._discard(path)

    def _discard(self, path: str) -> None:
        if path in self:
            top, _, name = path.rpartition("/")
            self._names[top].discard(name)
            self._number -= 1
            if not self._names[top]:
                del self._names[top]

    def filled(self, path: str) -> None:
        """There is something in this one now, and so the filesystem has it, and those above it."""
        while path:
            self.discard(path)
            path = parent(path)

    def moved(self, old: str, new: str) -> None:
        """What was at a path, and all below it, is at another one. What has too long a path then is left out."""
        with self._lock:
            those = self._below(old)
            for path in those:
                self._discard(path)
            for path in those:
                if not is_too_long(there := new + path[len(old):]):
                    self._add(there)


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
    mover = _mover(fs)
    if not _has_mv(mover, old):
        _move_each(fs, old, new, is_directory=is_directory)
    elif is_directory and _takes_recursive(mover):
        fs.mv(old, new, recursive=True)
    else:
        fs.mv(old, new)


def _mover(fs: Any) -> Any:
    """The filesystem whose ``mv`` it will be: one that is a directory of another one asks that."""
    wrapper = sys.modules.get("fsspec.implementations.dirfs")
    while wrapper is not None and isinstance(fs, wrapper.DirFileSystem):
        fs = fs.fs
    return fs


def _has_mv(fs: Any, old: str) -> bool:
    # What fsspec has for who has no mv of its own takes a name with a "*" for all those that are like it, and copies
    # directories as if they were files. Object storage, which is asynchronous, falls back on that where it has one.
    if type(fs).mv is sys.modules["fsspec.spec"].AbstractFileSystem.mv:
        return False
    return not (has_magic(old) and fs.async_impl)


def _takes_recursive(fs: Any) -> bool:
    parameters = inspect.signature(fs.mv).parameters.values()
    return any(one.name == "recursive" or one.kind is one.VAR_KEYWORD for one in parameters)


def _move_each(fs: Any, old: str, new: str, *, is_directory: bool) -> None:
    if not is_directory:
        fs.cp_file(old, new)
        fs.rm_file(old)
        return
    fs.mkdir(new, create_parents=False)
    for entry in fs.ls(old, detail=True):
        whole = str(entry["name"]).strip("/")
        if whole == old.strip("/"):             # some list the directory itself
            continue
        name = whole.rpartition("/")[2]
        _move_each(fs, f"{old}/{name}", f"{new}/{name}", is_directory=entry["type"] == "directory")
    with suppress(FileNotFoundError):           # it went with what was in it
        fs.rmdir(old)


def parent(path: str) -> str:
    """The directory that a path is in; the root is empty."""
    return path.rpartition("/")[0]


def is_below(path: str, top: str) -> bool:
    """Whether it is ``top`` or below it."""
    return path == top or path.startswith(f"{top}/")
