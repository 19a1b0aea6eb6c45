"""What of this machine uses a disk: mounts, and devices made of it (partitions, loop devices, the device mapper).

A guest that reads a disk which this machine writes to finds a damaged file system, and two that write damage it for
good. Locks don't tell: the kernel takes none for what it mounts.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from pykata.host.mounts import device_number, mounts

SYS = Path("/sys")


def where_written(descriptor: int) -> str:
    """Where this machine has a disk (a file, or a block device) mounted for writing; else an empty text.

    The file system decides, not the mount: what is mounted read-only here may be written to elsewhere. Mounts of other
    namespaces aren't seen.
    """
    found = os.fstat(descriptor)
    if stat.S_ISBLK(found.st_mode):
        return device_written(found.st_rdev)
    loops = _loops(partial(os.path.samestat, found))
    return next((place for device in loops if (place := device_written(device))), "")


def device_written(device: int) -> str:
    """The same of the block device with this number, and of all that was made of it."""
    written = {mount.device: mount.place for mount in reversed([*mounts()]) if not mount.readonly}
    seen, left = set[int](), [device]
    while left:
        device = left.pop()
        if device in written:
            return written[device]
        if device not in seen:
            seen.add(device)
            left += _made_of(device)
    return ""


def loop_of(descriptor: int) -> str:
    """A loop device that this machine has made of a file; else an empty text."""
    device = next(_loops(partial(os.path.samestat, os.fstat(descriptor))), None)
    return "" if device is None else f"/dev/{_folder(device).resolve().name}"


def _made_of(device: int) -> Iterator[int]:
    """Holders, partitions (sysfs-block), and loop devices."""
    folder = _folder(device)
    for each in (*folder.glob("holders/*"), *(file.parent for file in folder.glob("*/partition"))):
        with suppress(OSError):
            yield device_number((each / "dev").read_text())
    yield from _loops(lambda found: found.st_rdev == device)


def _loops(is_it: Callable[[os.stat_result], bool]) -> Iterator[int]:
    """The loop devices of a file or a block device (sysfs-block-loop)."""
    try:
        names = os.listdir(SYS / "block")   # not by a glob: this is asked for each container's image
    except OSError:     # no sysfs: nothing is known of devices
        return
    for name in names:
        with suppress(OSError), open(SYS / "block" / name / "loop/backing_file", "rb") as file:
            if is_it(os.stat(file.read().rstrip(b"\n"))):
                yield device_number((SYS / "block" / name / "dev").read_text())


def _folder(device: int) -> Path:
    return SYS / "dev/block" / f"{os.major(device)}:{os.minor(device)}"
