"""Packs what is written as a tar into a layer of the depot: compressed with zstd, hashed on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import IO, TypeVar, cast

import anyio.to_thread
import zstandard
from attrs import frozen

from pykata.images.depot import Depot, explained
from pykata.images.stream import CHUNK

LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"
LEVEL = 3

WriteTar = Callable[[IO[bytes]], None]
T = TypeVar("T")


@frozen
class Built:
    """A layer that is in the depot."""

    digest: str
    size: int
    diff_id: str
    media_type: str = LAYER


def copy_file(tar: Path, dest: IO[bytes]) -> None:
    """Write a tar that is in a file."""
    with tar.open("rb") as file:
        while chunk := file.read(CHUNK):
            dest.write(chunk)


class _AbandonedError(Exception):
    """Nobody waits for this any more."""


async def pack(depot: Depot, write_tar: WriteTar) -> Built:
    """A layer of what ``write_tar`` writes."""
    return await unless_left(lambda poll: _pack(depot, write_tar, poll))


async def digest_of(write_tar: WriteTar) -> str:
    """The digest of what ``write_tar`` writes, which goes nowhere."""
    def write(poll: Callable[[], None]) -> str:
        hashing = _Hashing(poll)
        write_tar(cast(IO[bytes], hashing))
        return f"sha256:{hashing.plain.hexdigest()}"

    return await unless_left(write)


async def unless_left(work: Callable[[Callable[[], None]], T]) -> T:
    """Do it in a thread. The one that is left when this is cancelled ends as soon as it calls what it is given."""
    stop = Event()

    def poll() -> None:
        if stop.is_set():
            raise _AbandonedError

    try:
        return await anyio.to_thread.run_sync(work, poll, abandon_on_cancel=True)
    finally:
        stop.set()


def _pack(depot: Depot, write_tar: WriteTar, poll: Callable[[], None]) -> Built:
    folder = depot.path / "blobs" / "sha256"
    with explained(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = folder / f"{os.urandom(8).hex()}.new"
        try:
            with fresh.open("xb") as file:
                packing = _Packing(file, poll)
                write_tar(cast(IO[bytes], packing))
                built = packing.finish()
            fresh.rename(depot.blob(built.digest))
        finally:
            fresh.unlink(missing_ok=True)
    return built


class _Hashing:
    """Hashes a tar."""

    def __init__(self, poll: Callable[[], None]) -> None:
        self.flush = poll
        self.plain = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.flush()
        self.plain.update(data)
        return len(data)


class _Packing(_Hashing):
    """Compresses a tar into a file as well, and hashes that, too."""

    def __init__(self, file: IO[bytes], poll: Callable[[], None]) -> None:
        super().__init__(poll)
        self._file = file
        self._zstd = zstandard.ZstdCompressor(level=LEVEL).compressobj()
        self._packed, self._size = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self._add(self._zstd.compress(bytes(data)))
        return super().write(data)

    def finish(self) -> Built:
        self._add(self._zstd.flush())
        self._file.flush()
        return Built(f"sha256:{self._packed.hexdigest()}", self._size, f"sha256:{self.plain.hexdigest()}")

    def _add(self, packed: bytes) -> None:
        self._packed.update(packed)
        self._size += len(packed)
        self._file.write(packed)
