"""Marks of the named volumes that sandboxes use, for who would remove one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pykata.host import byte_is_locked, lock_byte


@contextmanager
def marked(path: Path) -> Iterator[None]:
    """Mark a volume as used while the block runs. The kernel takes the mark away, however we end."""
    with _opened(path) as descriptor:
        if descriptor is not None:
            with suppress(OSError):         # a filesystem without locks: nobody will know
                lock_byte(descriptor, shared=True)
        yield


def is_marked(path: Path) -> bool:
    """Whether a sandbox of this machine, in whatever process, uses the volume. False where that can't be known."""
    with _opened(path) as descriptor, suppress(OSError):
        return descriptor is not None and byte_is_locked(descriptor)
    return False


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:         # what is wrong with it is told by who serves it
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
