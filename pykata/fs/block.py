"""Images as block devices: each becomes one read-only squashfs, made once and shared by every sandbox."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from attrs import field, frozen

from pykata import host
from pykata.errors import ConfigError, HostError, VolumeInUseError
from pykata.fs.base import SharedFs
from pykata.fs.kept import make_kept, open_kept
from pykata.fs.squashfs import COMPRESSORS, FORMAT, convert, converter
from pykata.spec import Attachment, Disk, Image, Mount

TAG = "rootfs"


def _known(block: Block, attribute: object, value: object) -> None:
    if value not in COMPRESSORS:
        raise ConfigError(f"compression={value!r} is none of {', '.join(COMPRESSORS)}")


@frozen
class Block(SharedFs):
    """Attach an image as a read-only squashfs on a virtio block device.

    ::

        Sandbox(fs=Block(compression="zstd"))

    The image is converted the first time it is used, and kept by its content in :func:`~pykata.host.cache_dir`. lz4 is
    read as fast as uncompressed data, also under emulation (272 against 278 MB/s; zstd 184), and halves it; zstd takes
    another quarter off. Debian with Python, 216 MB: lz4 0.30 s and 104 MB, zstd 0.54 s and 77 MB.
    """

    name = "block"
    compression: Literal["lz4", "zstd"] = field(default="lz4", validator=_known)

    @asynccontextmanager
    async def rootfs(self, image: Image, run_dir: Path) -> AsyncIterator[Attachment]:
        """Make ``image`` attachable; it is converted if that wasn't done before.

        Raises :class:`~pykata.errors.ImageError` if it is damaged, and :class:`~pykata.errors.HostError`.
        """
        if image.disk is not None:
            with ready(image) as attached:
                yield attached
            return
        async with self._kept(image) as path:
            yield attachment(Disk(TAG, path), "squashfs")

    @asynccontextmanager
    async def made(self, image: Image) -> AsyncIterator[None]:
        """Convert ``image``, if that wasn't done before. Raises as :meth:`rootfs` does."""
        if image.disk is not None:
            with ready(image):
                yield
            return
        async with self._kept(image):
            yield

    @asynccontextmanager
    async def _kept(self, image: Image) -> AsyncIterator[Path]:
        path = self._path(image)
        while (descriptor := open_kept(path)) is None:
            assert image.write_tar is not None
            await make_kept(path, partial(convert, image.write_tar, compression=self.compression))
        try:
            yield path
        finally:
            os.close(descriptor)

    def tool(self) -> Path:
        """The program that converts images. Raises :class:`~pykata.errors.ToolMissingError`."""
        return converter()

    def _path(self, image: Image) -> Path:
        return folder() / f"{stem(image.digest)}-{self.compression}-{FORMAT}.squashfs"


def kept_disks(digest: str) -> list[Path]:
    """What was made of the image with this digest, and is kept."""
    return sorted(folder().glob(f"{stem(digest)}-*.squashfs"))


def folder() -> Path:
    """Where what was made of images is kept."""
    return host.cache_dir() / "rootfs"


def stem(digest: str) -> str:
    """How the names of what was made of an image begin."""
    return digest.replace(":", "-")


@contextmanager
def ready(image: Image) -> Iterator[Attachment]:
    """An image that is a disk, as it is. Nobody writes to it as a volume while the block runs.

    Raises :class:`~pykata.errors.VolumeInUseError` if somebody does already, or this machine has it mounted for that.
    """
    assert image.disk is not None
    with _shared(image.disk) as descriptor:
        disk = Disk(TAG, image.disk, image.disk_format, is_device=image.disk_is_device, descriptor=descriptor)
        yield attachment(disk, image.disk_type)


def attachment(disk: Disk, kind: str) -> Attachment:
    """A read-only disk that is the lowest layer of a root filesystem."""
    # A journal that wasn't finished can't be replayed on a disk that is read-only.
    options = ("ro", "noload") if kind == "ext4" else ("ro",)
    return Attachment(devices=(disk,), mounts=(Mount(source=TAG, type=kind, options=options),))


@contextmanager
def _shared(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise HostError(f"can't open the disk {path}: {exc.strerror}") from exc
    try:
        _lock(descriptor, path)
        if place := host.where_written(descriptor):
            raise VolumeInUseError(f"the disk {path} is mounted for writing by this machine, at {place}",
                                   hint=f"an image must stay as it is while it is used: mount -o remount,ro {place}")
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise VolumeInUseError(f"the disk {path} is in use by a sandbox that writes to it",
                               hint="an image must stay as it is while it is used") from None
