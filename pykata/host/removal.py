"""Removing trees that somebody else has filled: a guest, say, that makes them as deep and as closed as it likes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ENTRIES = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)


def remove_tree(path: Path) -> None:
    """Remove a directory and all that is in it, however deep, and whatever its modes forbid. Raises OSError.

    No link is followed, and no way back up is taken: who moves things about meanwhile leads us nowhere else. What comes
    into the directory itself meanwhile stays, and ENOTEMPTY is raised: there we needn't be faster than its maker.
    """
    with _opened(path) as top:
        names, numbers = os.listdir(top), count()
        while names:
            name = names.pop()
            if not _unlinked(name, top):
                names += _empty(name, top, numbers)
    os.rmdir(path)


def _empty(name: str, top: int, numbers: Iterator[int]) -> list[str]:
    """Remove a directory that is in ``top``. What directories it has come into ``top``, which so gets no deeper.

    Returns their names there.
    """
    with _opened(name, top) as here:
        raised = [_raise(below, here, top, numbers) for below in os.listdir(here) if not _unlinked(below, here)]
    os.rmdir(name, dir_fd=top)
    return raised


def _raise(name: str, here: int, top: int, numbers: Iterator[int]) -> str:
    with _opened(name, here):           # to move a directory is to write its ".."
        while True:
            above = f".{next(numbers)}"
            try:
                os.rename(name, above, src_dir_fd=here, dst_dir_fd=top)
            except OSError as exc:
                if exc.errno not in (*_NOT_EMPTY, errno.ENOTDIR):       # the name is taken
                    raise
            else:
                return above


def _unlinked(name: str, directory: int) -> bool:
    """Whether it is gone; False for a directory that isn't empty."""
    with suppress(FileNotFoundError):
        try:
            os.unlink(name, dir_fd=directory)
        except (IsADirectoryError, PermissionError):        # unlink(2): EISDIR; EPERM elsewhere
            try:
                os.rmdir(name, dir_fd=directory)
            except NotADirectoryError:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), name) from None
            except OSError as exc:
                if exc.errno in _NOT_EMPTY:
                    return False
                raise
    return True


@contextmanager
def _opened(name: str | Path, directory: int | None = None) -> Iterator[int]:
    """A directory, in which its owner may do everything from now on."""
    place = os.open(name, _PLACE, dir_fd=directory)
    try:
        with suppress(PermissionError):     # it is somebody else's
            os.chmod(f"/proc/self/fd/{place}", 0o700)
        descriptor = os.open(f"/proc/self/fd/{place}", _ENTRIES)
    finally:
        os.close(place)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
