"""Files that are made once and kept: by one process at a time, whole or not at all, and known to be in use."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio.to_thread

from pykata import host
from pykata.errors import DiskFullError, HostError

_SUPERBLOCK = struct.Struct("<4s36xQ")      # squashfs: its magic, and bytes_used at offset 40


def open_kept(path: Path) -> int | None:
    """Open a kept squashfs, or None if it isn't there.

    The descriptor holds a shared lock for as long as it is open: who clears the cache takes an exclusive one first. The
    time of the last use is the file's mtime.
    """
    with _translated(path):
        return _open_kept(path)


def _open_kept(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if host.is_at(descriptor, path) and _is_whole(descriptor):
            with suppress(PermissionError):     # another user's cache, shared with us
                os.utime(descriptor)
            return descriptor
    except BlockingIOError:
        pass                                    # it is being removed
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


async def make_kept(path: Path, make: Callable[[Path], Awaitable[None]]) -> None:
    """Make a squashfs, unless it is there: ``make`` writes to the path that it is given.

    Whoever asks for the same file meanwhile, in whatever process, waits for it. If this is cancelled, or ``make``
    fails, nothing is left, and the next who waits makes it.
    """
    with _translated(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with host.locked(_lock_path(path)):
            if (descriptor := open_kept(path)) is not None:
                os.close(descriptor)
                return
            collect(path.parent)
            part = path.with_suffix(".part")
            try:
                await make(part)
                await anyio.to_thread.run_sync(_sync, part)
                part.rename(path)
                await anyio.to_thread.run_sync(host.trim_cache)
            finally:
                part.unlink(missing_ok=True)


def collect(folder: Path) -> None:
    """Remove what makers left behind that were killed."""
    for pattern in ("*.part", "*.lock"):
        for left in folder.glob(pattern):
            host.remove_unfinished(left)


# --- files ---


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")


def _is_whole(descriptor: int) -> bool:
    # A host that lost power may have kept the name and lost the data.
    raw = os.pread(descriptor, _SUPERBLOCK.size, 0)
    if len(raw) < _SUPERBLOCK.size:
        return False
    magic, used = _SUPERBLOCK.unpack(raw)
    return bool(magic == b"hsqs" and used <= os.fstat(descriptor).st_size)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not _is_whole(descriptor):
            raise HostError(f"{path} is not a squashfs")
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"no space left for {path}") from exc
        raise HostError(f"can't make {path}: {exc}") from exc
