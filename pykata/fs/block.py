"""Images as block devices: each becomes one read-only squashfs, made once and shared by every sandbox."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from attrs import field, frozen

from pykata import host
from pykata.errors import ConfigError
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
            yield attachment(image.disk, image.disk_type)
            return
        path = self._path(image)
        while (descriptor := open_kept(path)) is None:
            assert image.write_tar is not None
            await make_kept(path, partial(convert, image.write_tar, compression=self.compression))
        try:
            yield attachment(path, "squashfs")
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


def attachment(path: Path, kind: str) -> Attachment:
    """A read-only disk that is the lowest layer of a root filesystem."""
    # A journal that wasn't finished can't be replayed on a disk that is read-only.
    options = ("ro", "noload") if kind == "ext4" else ("ro",)
    return Attachment(
        devices=(Disk(tag=TAG, path=path, readonly=True),),
        mounts=(Mount(source=TAG, type=kind, options=options),),
    )
