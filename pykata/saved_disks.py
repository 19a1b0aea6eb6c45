"""The disks of a saved guest, as files beside its memory: copies that are its own, with their hashes.

A link would be free, but it is the same file: who damages or removes what was made of an image would do so to each
template, and it would have that file's mode. Where the filesystem can share blocks, a copy is free, too.

A disk may be large, so it isn't hashed at each start: what a file was when its hash was compared is noted beside it,
for as long as the host runs; after a power failure the notes would be worth nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import frozen

from pykata.host import Stamp, copy_file, copy_range, file_hash, stamp
from pykata.images.qcow2 import Qcow2Error, open_qcow2
from pykata.spec import Disk

NOTES = "checked.json"
FICLONE = 0x40049409        # ioctl_ficlone(2)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_verified: dict[Stamp, str] = {}
"""The hash that this process knows each file to have."""


@frozen
class Written:
    """A disk as it was written: where it was plugged in, its format, its bytes and their hash."""

    number: int
    format: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"slot{self.number}"


def size_of(disk: Disk) -> int:
    """Bytes of a disk, which may be a device. Raises OSError."""
    descriptor = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def write(folder: Path, disks: Mapping[int, Disk]) -> list[Written]:
    """Copy the disks that are plugged in, by their numbers, into a directory. Raises OSError."""
    written = []
    for number, disk in disks.items():
        path = folder / f"slot{number}"
        _copy(disk, path)
        digest = file_hash(path)
        _verified[stamp(path.stat())] = digest
        written.append(Written(number, disk.format, path.stat().st_size, digest))
    _note(folder, written)
    return written


def read(folder: Path, written: Iterable[Mapping[str, Any]]) -> dict[int, Disk]:
    """The disks of a directory, as what :func:`write` returned says. Raises ValueError for what isn't that."""
    disks = [Written(**each) for each in written]
    notes = None
    for disk in disks:
        path = folder / disk.name
        found = path.stat()
        if found.st_size != disk.size:
            raise ValueError(f"{path.name} has {found.st_size} bytes, which isn't what was saved")
        if _verified.get(stamp(found)) == disk.sha256:
            continue
        notes = _notes(folder) if notes is None else notes
        if notes.get(path.name) != [*stamp(found), disk.sha256] and file_hash(path) != disk.sha256:
            raise ValueError(f"{path.name} isn't what was saved")
        _verified[stamp(found)] = disk.sha256
    if notes is not None:
        _note(folder, disks)
    return {disk.number: _plugged(folder / disk.name, disk.format) for disk in disks}


def are_unchanged(disks: Iterable[Disk]) -> bool:
    """Whether disks that were read before are as they were."""
    try:
        return all(stamp(disk.path.stat()) in _verified for disk in disks)
    except OSError:
        return False


def _plugged(path: Path, form: str) -> Disk:
    """The directory may have come from elsewhere, with an image in it that names a file of this host."""
    if form == "raw":
        return Disk(path.name, path)
    if form == "qcow2":
        with path.open("rb") as file:
            try:
                open_qcow2(file.fileno())
            except Qcow2Error as exc:
                raise ValueError(f"{path.name}: {exc}") from exc
        return Disk(path.name, path, "qcow2")
    raise ValueError(f"{path.name} has a format {form!r} that disks don't have")


def _copy(disk: Disk, path: Path) -> None:
    source = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _copy_content(source, target, is_device=disk.is_device)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_content(source: int, target: int, *, is_device: bool) -> None:
    with suppress(OSError):         # another filesystem, or one whose files can't share blocks
        fcntl.ioctl(target, FICLONE, source)
        return
    size = os.lseek(source, 0, os.SEEK_END)
    if is_device:                   # which can't tell where it has holes
        os.lseek(source, 0, os.SEEK_SET)
        copy_range(source, target, 0, size)
    else:
        os.ftruncate(target, size)
        copy_file(source, target)


def _notes(folder: Path) -> Mapping[str, object]:
    try:
        found = json.loads((folder / NOTES).read_text())
        return dict(found["files"]) if found["boot"] == _boot() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _note(folder: Path, disks: Iterable[Written]) -> None:
    files = {disk.name: [*stamp((folder / disk.name).stat()), disk.sha256] for disk in disks}
    fresh = folder / f".{NOTES}.{os.urandom(4).hex()}"
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump({"boot": _boot(), "files": files}, file)
        fresh.rename(folder / NOTES)
    except OSError:                 # a directory that is only read; its disks are hashed by each process
        fresh.unlink(missing_ok=True)


def _boot() -> str:
    return BOOT_ID.read_text().strip()
