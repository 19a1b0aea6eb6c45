"""Archives that can't be read in place, from a pipe or compressed: written to the cache first."""

from __future__ import annotations

import hashlib
import os
import select
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path

from pykata import host
from pykata.errors import ImageCorruptError
from pykata.images.compression import decompressed
from pykata.images.depot import explained
from pykata.images.limits import Limits
from pykata.images.stream import CHUNK, StreamError

TICK = 100      # milliseconds after which a wait looks whether it is still wanted

Poll = Callable[[], None]
"""Raises when nobody waits any more."""


def spooled(chunks: Generator[bytes, None, None], name: str, limits: Limits, key: str = "") -> Path:
    """Write an archive into the cache, uncompressed; returns its path. ``name`` is for messages.

    ``key`` names the same archive the next time; without one its content does.
    """
    folder = archive_path("").parent
    with closing(chunks), explained(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = folder / f"{os.urandom(8).hex()}.new"
        try:
            digest = _write(chunks, fresh, name, limits)
            path = archive_path(key or digest)
            fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)
    return path


def find_spooled(key: str) -> Path | None:
    """The archive that was written under this key, if it is still there. It counts as used now."""
    path = archive_path(key)
    try:
        os.utime(path)
    except OSError:
        return None
    return path


def archive_path(key: str) -> Path:
    return host.cache_dir() / "images" / "archives" / f"{key}.tar"


def _write(chunks: Iterator[bytes], fresh: Path, name: str, limits: Limits) -> str:
    hashing, size = hashlib.sha256(), 0
    with fresh.open("xb", buffering=0) as file:
        try:
            for chunk in decompressed(chunks):
                size += len(chunk)
                if size > limits.size:
                    raise ImageCorruptError(f"{name} has more than {limits.size} bytes")
                hashing.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) or 0:]
        except StreamError as exc:
            raise ImageCorruptError(f"{name} can't be uncompressed: {exc}") from exc
    return hashing.hexdigest()


def read_file(path: Path, poll: Poll) -> Generator[bytes, None, None]:
    """The bytes of a file or pipe. Of a pipe nobody writes to yet none are there: that is waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        while True:
            while not ready.poll(TICK):
                poll()
            poll()
            try:
                chunk = os.read(descriptor, CHUNK)
            except BlockingIOError:
                continue
            if not chunk:
                return
            yield chunk
    finally:
        os.close(descriptor)
