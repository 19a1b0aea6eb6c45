"""Keeps what images take in the cache below a limit: what was used least recently goes first."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from pykata.errors import ConfigError
from pykata.host.directories import cache_dir
from pykata.host.locks import is_at, open_lock

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 20 * 1024**3    # bytes
FRESH = 60.0                    # seconds
BUILDING = "build-"            # a directory in which an image is being made
ABANDONED = 24 * 3600.0         # seconds after which nobody comes back for a file that isn't whole
VARIABLE = "PYKATA_CACHE_LIMIT"

CONTENT = ".content"             # a directory beside a file of the cache that belongs to it
CONTENT_SIZE = "size"           # a file in it that says how many bytes it takes

_FOLDERS = ("rootfs", "images/archives", "images/names", "images/steps", "images/blobs/sha256", "images/blobs/sha512")
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_UNFINISHED = (".part", ".new", ".lock")


@frozen
class Kept:
    """A file of the cache; ``used`` is when it was used last, in seconds since 1970, and is its mtime."""

    path: Path
    size: int
    used: float


def cache_limit() -> int:
    """Bytes that images may take: ``$PYKATA_CACHE_LIMIT``, such as ``20G``. Raises ConfigError."""
    return size_in(VARIABLE, DEFAULT_LIMIT)


def size_in(variable: str, default: int) -> int:
    """Bytes that an environment variable says, as a number or as text such as ``20G``. Raises ConfigError."""
    text = os.environ.get(variable, "")
    if not text:
        return default
    match = re.fullmatch(r"(\d{1,15})\s*([KMGT]?)(?:iB|B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise ConfigError(f"{variable}={text!r} is not a size", hint="give bytes, or text such as 20G")
    return int(match[1]) * _UNITS[match[2].upper()]


def trim_cache(limit: int | None = None) -> list[Kept]:
    """Remove files until they are below ``limit`` bytes (by default :func:`cache_limit`); returns what went.

    What a sandbox uses is locked, and stays, and so does what was used within the last minute. What a process left
    unfinished goes after a day.
    """
    limit = cache_limit() if limit is None else limit
    found = sorted(_files(cache_dir()), key=lambda file: file.used)
    total, removed = sum(file.size for file in found), list[Kept]()
    for file in found:
        # What was made or found a moment ago may not be locked yet.
        if total <= limit or file.used > time.time() - FRESH:
            break
        if remove_unused(file.path):
            log.debug("%s was removed: images take more than %d bytes", file.path, limit)
            removed.append(file)
            total -= file.size
    return removed


def remove_unused(path: Path) -> bool:
    """Remove a file of the cache unless somebody uses it, which is a shared lock; returns whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        shutil.rmtree(path.with_suffix(CONTENT), ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _files(cache: Path) -> Iterator[Kept]:
    """All whole files. Those that were left unfinished long ago are removed on the way."""
    now = time.time()
    for folder in _FOLDERS:
        for path in (cache / folder).glob("*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                if path.suffix == CONTENT:
                    if found.st_mtime < now - ABANDONED and not path.with_suffix(".squashfs").exists():
                        shutil.rmtree(path, ignore_errors=True)
                elif path.suffix in _UNFINISHED:
                    if found.st_mtime < now - ABANDONED:
                        remove_unfinished(path)
                else:
                    yield Kept(path, found.st_size + _content_size(path), found.st_mtime)
    for path in (cache / "images").glob(BUILDING + "*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < now - ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def _content_size(path: Path) -> int:
    try:
        return int((path.with_suffix(CONTENT) / CONTENT_SIZE).read_text())
    except (OSError, ValueError):
        return 0


def remove_unfinished(path: Path) -> None:
    """Remove what a maker left behind, with its lock, unless it is still at it: the kernel frees locks of the dead."""
    lock = path.with_suffix(".lock")
    with suppress(FileNotFoundError, BlockingIOError):
        descriptor = open_lock(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(descriptor, lock):
                for left in (path, path.with_suffix(".part")):
                    left.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
