"""Disk images that are used as they are: ext4, squashfs and erofs, whole disks without a partition table.

They are files, raw or qcow2, or block devices of this machine, whatever makes them: a loop device, the device mapper.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from pykata.errors import ImageError, ImageNotFoundError, ImageUnsupportedError
from pykata.images.qcow2 import MAGIC as QCOW2
from pykata.images.qcow2 import Qcow2Error, open_qcow2
from pykata.images.reference import Reference
from pykata.images.superblock import HEAD, filesystem_of, wrong_with
from pykata.images.tarball import DEFAULT_CONFIG
from pykata.spec import DiskFormat, Image

PAGE = 4096     # bytes that a guest reads at a time

_OTHERS = (("qcow2", 0, QCOW2), ("a disk with partitions", 510, b"\x55\xaa"), ("xfs", 0, b"XFSB"))


def find_disk(reference: Reference, architecture: str, form: DiskFormat) -> Image:
    """Find a disk image. It isn't copied: who writes to it while a sandbox has it breaks the sandbox's files."""
    path = reference.path.absolute()
    with _opened(path) as descriptor:
        found = os.fstat(descriptor)
        try:
            head, size = read_head(descriptor, form)
        except Qcow2Error as exc:
            raise ImageUnsupportedError(f"{path} can't be used: {exc}", hint=exc.hint) from exc
    kind = filesystem_of(head)
    if kind is None:
        raise ImageUnsupportedError(f"{path} is {_other(head)}", hint=_hint(head, form))
    if size % PAGE:
        raise ImageUnsupportedError(f"{path} has {size} bytes, no multiple of {PAGE}",
                                    hint=f"truncate --size=%{PAGE} {path}" if form == "raw" else "qemu-img resize")
    if why := wrong_with(kind, head, size):
        raise ImageUnsupportedError(f"{path} is {kind} that can't be mounted: {why}")
    # A block device has no time of its last change; its superblock has.
    identity = (str(path), found.st_dev, found.st_ino, size, found.st_mtime_ns, found.st_ctime_ns, form, head)
    return Image(
        reference=reference.text, digest=f"sha256:{hashlib.sha256(repr(identity).encode()).hexdigest()}",
        config=DEFAULT_CONFIG, architecture=architecture, disk=path, disk_type=kind, disk_format=form,
        disk_is_device=stat.S_ISBLK(found.st_mode),
    )


def read_head(descriptor: int, form: DiskFormat) -> tuple[bytes, int]:
    """The first :data:`HEAD` bytes of a disk, and how many it has. Raises Qcow2Error, OSError."""
    if form == "qcow2":
        image = open_qcow2(descriptor)
        return image.read(HEAD), image.size
    return os.pread(descriptor, HEAD, 0), os.lseek(descriptor, 0, os.SEEK_END)


@contextmanager
def _opened(path: os.PathLike[str]) -> Iterator[int]:
    """A file or a block device: anything else might block for ever, such as a fifo."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ImageNotFoundError(f"there is no file {path}") from None
    except OSError as exc:
        raise ImageError(f"can't read {path}: {exc.strerror}") from exc
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ImageUnsupportedError(f"{path} is neither a file nor a block device",
                                        hint="a directory is dir:ROOTFS" if stat.S_ISDIR(mode) else "")
        yield descriptor
    except OSError as exc:
        raise ImageError(f"can't read {path}: {exc.strerror}") from exc
    finally:
        os.close(descriptor)


def _other(head: bytes) -> str:
    found = (name for name, at, magic in _OTHERS if head[at:at + len(magic)] == magic)
    return next(found, "no filesystem that we know")


def _hint(head: bytes, form: DiskFormat) -> str:
    if form == "raw" and head.startswith(QCOW2):
        return "qcow2:FILE says that it is one: a raw disk could look like that, too"
    return "a disk is an ext4, squashfs or erofs, whole"
