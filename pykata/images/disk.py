"""Disk images that are used as they are: ext4, squashfs and erofs, whole disks without a partition table."""

from __future__ import annotations

import hashlib
import os

from pykata.errors import ImageError, ImageNotFoundError, ImageUnsupportedError
from pykata.images.reference import Reference
from pykata.images.store import open_file
from pykata.images.superblock import HEAD, filesystem_of, wrong_with
from pykata.images.tarball import DEFAULT_CONFIG
from pykata.spec import Image

PAGE = 4096     # bytes that a guest reads at a time

_OTHERS = (("qcow2", 0, b"QFI\xfb"), ("a disk with partitions", 510, b"\x55\xaa"), ("xfs", 0, b"XFSB"))


def find_disk(reference: Reference, architecture: str) -> Image:
    """Find a disk image. It isn't copied: who writes to it while a sandbox has it breaks the sandbox's files."""
    path = reference.path.absolute()
    try:
        with open_file(path) as file:
            head, found = file.read(HEAD), os.fstat(file.fileno())
    except FileNotFoundError:
        raise ImageNotFoundError(f"there is no file {path}") from None
    except OSError as exc:
        raise ImageError(f"can't read {path}: {exc.strerror}") from exc
    kind = filesystem_of(head)
    if kind is None:
        others = [name for name, at, magic in _OTHERS if head[at:at + len(magic)] == magic]
        raise ImageUnsupportedError(f"{path} is {others[0] if others else 'no filesystem that we know'}",
                                    hint="a disk: is a raw ext4, squashfs or erofs")
    if found.st_size % PAGE:
        raise ImageUnsupportedError(f"{path} has {found.st_size} bytes, no multiple of {PAGE}",
                                    hint=f"truncate --size=%{PAGE} {path}")
    if why := wrong_with(kind, head, found.st_size):
        raise ImageUnsupportedError(f"{path} is {kind} that can't be mounted: {why}")
    identity = (str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return Image(
        reference=reference.text, digest=f"sha256:{hashlib.sha256(repr(identity).encode()).hexdigest()}",
        config=DEFAULT_CONFIG, architecture=architecture, disk=path, disk_type=kind,
    )
