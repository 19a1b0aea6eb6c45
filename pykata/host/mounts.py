"""What is mounted, as this process sees it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

MOUNTINFO = Path("/proc/self/mountinfo")
WHOLE = ("ext2", "ext3", "ext4", "xfs", "f2fs", "tmpfs")
"""File systems whose files all have the device number of the mount: those of btrfs or overlayfs may have others."""


@frozen
class Mounted:
    """A mount: of what device, where, and whether its file system (not only this mount of it) is read-only."""

    device: int
    place: str
    kind: str
    readonly: bool


def mounts() -> Iterator[Mounted]:
    """All of them, in their order (proc(5), mountinfo)."""
    for line in MOUNTINFO.read_text(errors="surrogateescape").splitlines():
        mount, _, filesystem = line.partition(" - ")
        words, (kind, *_, options) = mount.split(" "), filesystem.split(" ")
        place = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), words[4])
        yield Mounted(device_number(words[2]), place, kind, "ro" in options.split(","))


def is_one_filesystem(path: Path) -> bool:
    """Whether a directory and all below it are surely of one file system, with inode numbers that don't repeat."""
    device, below = os.stat(path).st_dev, os.path.join(os.path.realpath(path), "")
    kinds = set[str]()
    for mount in mounts():
        if mount.place.startswith(below) and mount.place != below:
            return False
        if mount.device == device:
            kinds.add(mount.kind)
    return bool(kinds) and kinds <= set(WHOLE)


def kinds_below(path: Path) -> set[str]:
    """The kinds of file system that a path is in and that are mounted below it; none for a subvolume of btrfs."""
    real = os.path.realpath(path)
    device, below = os.stat(real).st_dev, os.path.join(real, "")
    return {mount.kind for mount in mounts() if mount.device == device or mount.place.startswith(below)}


def device_number(text: str) -> int:
    """ "8:1" as a number."""
    major, _, minor = text.strip().partition(":")
    return os.makedev(int(major), int(minor))
