"""Disks as volumes: filesystems in files of the host, made when they are missing, and block devices."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from pykata.errors import ConfigError, HostError, NotPermittedError, VolumeInUseError
from pykata.host import find_tool, loop_of, run_tool, where_written
from pykata.images.disk import PAGE, read_head
from pykata.images.qcow2 import MAGIC as QCOW2
from pykata.images.qcow2 import Qcow2Error
from pykata.images.superblock import block_size, filesystem_of, wrong_with
from pykata.spec import PMEM_UNIT, VOLUMES, Attachment, Disk, Mount, Pmem
from pykata.volumes.kinds import DiskImage


@asynccontextmanager
async def disk(tag: str, volume: DiskImage) -> AsyncIterator[Attachment]:
    """The disk, made if it is missing, and locked as long as the block runs. Raises HostError."""
    descriptor = await _opened(volume)
    try:
        _lock(descriptor, volume)
        _check_this_machine(descriptor, volume)
        kind = _kind(descriptor, volume)
        options = ("ro", *(("noload",) if kind == "ext4" else ())) if volume.readonly else ()
        device: Disk | Pmem
        if volume.device == "pmem":
            _check_dax(descriptor, volume, kind)
            device = Pmem(tag, volume.path, os.fstat(descriptor).st_size, descriptor)
            options = (*options, "dax=always")
        else:
            device = Disk(tag, volume.path, volume.format, readonly=volume.readonly, is_device=_is_device(descriptor),
                          descriptor=descriptor)
        yield Attachment(
            devices=(device,),
            mounts=(Mount(tag, kind, f"{VOLUMES}/{tag}", ("nosuid", "nodev", *options)),),
        )
    finally:
        os.close(descriptor)


async def _opened(volume: DiskImage) -> int:
    try:
        return _open(volume)
    except FileNotFoundError as exc:
        if volume.size is None or volume.readonly:      # it was there when the sandbox was made
            raise HostError(f"the volume {volume.path} isn't there any more") from exc
        if volume.path.is_symlink():
            raise HostError(f"the volume {volume.path} is a link to {os.readlink(volume.path)}, and nothing is there",
                            hint="name the path that it leads to, or remove the link") from exc
    await _make(volume)
    try:
        return _open(volume)
    except FileNotFoundError as exc:
        raise HostError(f"the volume {volume.path} was removed while it was made") from exc


def _open(volume: DiskImage) -> int:
    flags = (os.O_RDONLY if volume.readonly else os.O_RDWR) | os.O_CLOEXEC
    try:
        # A block device that this machine has mounted, or has made another of, is in use as well (open(2), O_EXCL).
        alone = os.O_EXCL if not volume.readonly and volume.path.is_block_device() else 0
        return os.open(volume.path, flags | alone)
    except FileNotFoundError:
        raise
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise VolumeInUseError(f"the device {volume.path} is in use, by this machine or by another sandbox",
                                   hint="unmount it first, or take it readonly=True") from exc
        raise NotPermittedError(f"can't open the volume {volume.path}: {exc.strerror}") from exc


def _kind(descriptor: int, volume: DiskImage) -> str:
    try:
        head, size = read_head(descriptor, volume.format)
    except Qcow2Error as exc:
        raise ConfigError(f"the volume {volume.path} can't be used: {exc}", hint=exc.hint) from exc
    except OSError as exc:
        raise HostError(f"can't read the volume {volume.path}: {exc.strerror}") from exc
    if (kind := filesystem_of(head)) is not None:
        # Nobody unmounts one that a guest has written to: its journal is for whoever is next.
        if why := wrong_with(kind, head, size, is_unmounted=False):
            raise ConfigError(f"the volume {volume.path} can't be mounted: {why}")
        return kind
    hint = "is it a qcow2? format='qcow2' says so" if head.startswith(QCOW2) else "ext4, squashfs or erofs, whole"
    raise ConfigError(f"{volume.path} has no filesystem that we know", hint=hint)


def _check_dax(descriptor: int, volume: DiskImage, kind: str) -> None:
    """A page of a file must be a page of memory (filesystems/dax.rst)."""
    if (length := os.fstat(descriptor).st_size) % PMEM_UNIT or not length:
        raise ConfigError(f"{volume.path} has {length} bytes now, no multiple of 2 MiB, and device='pmem' maps those",
                          hint=f"truncate --size=%2M {volume.path}")
    if kind == "squashfs":
        raise ConfigError(f"{volume.path} is a squashfs, of which nothing can be mapped",
                          hint="mkfs.erofs, uncompressed, or mkfs.ext4 -b 4096 make one for device='pmem'")
    if (size := block_size(kind, read_head(descriptor, volume.format)[0])) != PAGE:
        raise ConfigError(f"{volume.path} has blocks of {size} bytes, and device='pmem' maps pages of {PAGE}",
                          hint="mkfs.ext4 -b 4096" if kind == "ext4" else "mkfs.erofs -b 4096")


def _is_device(descriptor: int) -> bool:
    return stat.S_ISBLK(os.fstat(descriptor).st_mode)


def _lock(descriptor: int, volume: DiskImage) -> None:
    kind = fcntl.LOCK_SH if volume.readonly else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise VolumeInUseError(
            f"the disk {volume.path} is in use by another sandbox, or twice by this one",
            hint="only one may write to a disk, and nobody else read it then; a directory can be shared",
        ) from None
    except OSError as exc:      # a filesystem without locks: nobody else would be noticed
        raise HostError(f"can't lock the volume {volume.path}: {exc.strerror}") from exc


def _check_this_machine(descriptor: int, volume: DiskImage) -> None:
    if place := where_written(descriptor):
        raise VolumeInUseError(f"the disk {volume.path} is mounted for writing by this machine, at {place}",
                               hint="unmount it first; several may read it once nobody writes to it")
    if not volume.readonly and (device := loop_of(descriptor)):
        raise VolumeInUseError(f"the disk {volume.path} is in use by this machine, as {device}",
                               hint=f"losetup --detach {device}, or take it readonly=True")


async def _make(volume: DiskImage) -> None:
    """Make the file whole or not at all; if somebody else does at the same time, theirs is as good."""
    assert isinstance(volume.size, int)
    inodes = [] if volume.files is None else ["-N", str(volume.files + RESERVED)]
    try:
        with _fresh(volume.path) as descriptor:
            os.truncate(descriptor, volume.size)
            # No blocks kept for root, who is the guest's; tables and journal are zeros in a fresh file anyway.
            argv: list[str | Path] = [
                find_tool("mkfs.ext4", package="e2fsprogs"), "-q", "-F", "-m", "0",
                "-E", "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1", *inodes, f"/proc/self/fd/{descriptor}",
            ]  # fmt: skip
            await run_tool(argv, pass_fds=(descriptor,))
            with suppress(FileExistsError):
                # With a directory's descriptor, which isn't used, Python has the link followed (linkat(2)).
                os.link(f"/proc/self/fd/{descriptor}", volume.path, src_dir_fd=descriptor)
    except OSError as exc:
        raise HostError(f"can't make the volume {volume.path}: {exc.strerror}") from exc


RESERVED = 11       # inodes that ext4 has for itself, "lost+found" among them (fs/ext4/ext4.h)


@contextmanager
def _fresh(path: Path) -> Iterator[int]:
    """An empty file that is to be at ``path``. Where that can be, it has no name until then, and is gone with us."""
    part = None
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR):       # of the filesystem, of the kernel
            raise
        part = path.with_name(f".{path.name}-{os.urandom(4).hex()}.part")
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        if part is not None:
            part.unlink(missing_ok=True)
