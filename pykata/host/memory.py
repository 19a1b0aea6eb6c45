"""Files in memory that hold the memory of a guest."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pykata.errors import HostError, SandboxClosedError

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@contextmanager
def memory_file(size: int) -> Iterator[int]:
    """A memfd of ``size`` bytes, all of it a hole; closed when the block is left."""
    try:
        descriptor = os.memfd_create("pykata-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as exc:
        raise HostError(f"can't make a file in memory: {exc.strerror}") from exc
    try:
        os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)


class Held:
    """A file that its owner may close: a :class:`~pykata.spec.HeldFile`. Made by :func:`held`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def fileno(self) -> int:
        """The descriptor. Raises SandboxClosedError if it was closed."""
        if self._descriptor is None:
            raise SandboxClosedError("what this sandbox goes on from was left",
                                     hint="enter it inside that one's 'async with' block, or use snapshot and restore")
        return self._descriptor

    def end(self) -> None:
        """Its owner is about to close it."""
        self._descriptor = None


@contextmanager
def held(descriptor: int) -> Iterator[Held]:
    """A file, for others to use while the block runs."""
    file = Held(descriptor)
    try:
        yield file
    finally:
        file.end()


def seal(memory: int) -> None:
    """From now on nobody can write to it.

    QEMU opens it for writing, for a mapping that is private: one that a guest broke into could change that of others.
    """
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)


def seal_size(memory: int) -> None:
    """From now on it can't become shorter or longer: who has it mapped can't lose what is there."""
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def extents(descriptor: int) -> Iterator[tuple[int, int]]:
    """Where a file has data: start and end of each piece."""
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:         # ENXIO: nothing but a hole is left
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def copy_file(source: int, target: int) -> None:
    """Copy what is in one memory file to another; holes stay holes."""
    for start, end in extents(source):
        os.lseek(target, start, os.SEEK_SET)
        copy_range(source, target, start, end)


def copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copy bytes of ``source`` to where ``target`` stands."""
    while start < end:
        sent = os.sendfile(target, source, start, end - start)
        if not sent:
            raise HostError("a file became shorter while it was read")
        start += sent
