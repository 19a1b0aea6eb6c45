"""Directories of the host by 9p, which QEMU serves itself: no daemon, and slower than virtio-fs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pykata.spec import VOLUMES, Attachment, Mount, NineP

MSIZE = 512_000     # bytes of a message; what the guest's driver takes at most (net/9p/trans_virtio.c)
CACHES: Mapping[str, str] = {
    "auto": "mmap",         # nothing but what is mapped into memory
    "always": "loose",
    "none": "none",
}


def directory(tag: str, path: Path, *, readonly: bool, cache: str) -> Attachment:
    """A directory, mounted as ``tag`` below :data:`~pykata.spec.VOLUMES`."""
    options = ("trans=virtio", "version=9p2000.L", f"msize={MSIZE}", f"cache={CACHES[cache]}", "nosuid", "nodev",
               *(("ro",) if readonly else ()))
    return Attachment(
        devices=(NineP(tag, path, readonly),),
        mounts=(Mount(tag, "9p", f"{VOLUMES}/{tag}", options),),
    )
