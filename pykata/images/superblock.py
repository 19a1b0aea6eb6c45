"""What the superblock of a disk image says: whether a guest can mount it, before one is started for it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

HEAD = 4096     # bytes at the start of a disk in which all superblocks are

_MAGIC = (
    ("squashfs", 0, b"hsqs"),                   # linux/fs/squashfs/squashfs_fs.h
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),       # linux/fs/erofs/erofs_fs.h
    ("ext4", 1024 + 56, b"\x53\xef"),           # linux/fs/ext4/ext4.h, s_magic; also of ext2 and ext3
)

_SQUASHFS = struct.Struct("<28xHH8xQ")          # version, bytes_used
_EROFS = struct.Struct("<1036xB23xI40xI2xHxxB")  # blkszbits, blocks, feature_incompat, extra_devices, dirblkbits
_EROFS_KNOWN = 0x7F                             # EROFS_ALL_FEATURE_INCOMPAT of Linux 6.12, the guest's
_EROFS_BLOCKS = range(9, 13)                    # log2 of a block's size: at most a page

_EXT4 = struct.Struct("<1028xI16xI68xI236xI")   # blocks (low), log2 of a block's KiB, feature_incompat, blocks (high)
_EXT4_RECOVER, _EXT4_JOURNAL_DEV, _EXT4_64BIT = 0x4, 0x8, 0x80


def filesystem_of(head: bytes) -> str | None:
    """The filesystem that begins with these bytes, as mount(8) calls it."""
    return next((name for name, at, magic in _MAGIC if head[at:at + len(magic)] == magic), None)


def wrong_with(kind: str, head: bytes, size: int, *, is_unmounted: bool = True) -> str:
    """Why a guest can't mount a disk of ``size`` bytes that begins with ``head``; empty if nothing speaks against.

    An ext4 that is read has to have been unmounted: who needn't be told of that says ``is_unmounted=False``.
    """
    head = head.ljust(HEAD, b"\0")
    if is_unmounted and kind == "ext4" and _EXT4.unpack_from(head)[2] & _EXT4_RECOVER:
        return "it was not unmounted, and its journal can't be replayed on a disk that is read-only: run e2fsck"
    return _CHECKS[kind](head, size)


def block_size(kind: str, head: bytes) -> int:
    """Bytes of a block of an ext4 or erofs that begins with ``head``."""
    head = head.ljust(HEAD, b"\0")
    bits: int = 10 + _EXT4.unpack_from(head)[1] if kind == "ext4" else _EROFS.unpack_from(head)[0]
    return 1 << min(bits, 63)   # whatever it says


def _wrong_with_squashfs(head: bytes, size: int) -> str:
    major, minor, used = _SQUASHFS.unpack_from(head)
    if (major, minor) != (4, 0):
        return f"it has version {major}.{minor}, and only 4.0 can be mounted"
    return _beyond(used, size)


def _wrong_with_erofs(head: bytes, size: int) -> str:
    bits, blocks, features, devices, directories = _EROFS.unpack_from(head)
    if bits not in _EROFS_BLOCKS:
        return f"its blocks have 2^{bits} bytes"
    if unknown := features & ~_EROFS_KNOWN:
        return f"it needs features {unknown:#x} that the guest's kernel doesn't have"
    if devices:
        return f"its data is on {devices} further devices"
    if directories:
        return "its directories have blocks of another size"
    return _beyond(blocks << bits, size)


def _wrong_with_ext4(head: bytes, size: int) -> str:
    low, log, features, high = _EXT4.unpack_from(head)
    if log > 6:
        return f"its blocks have 2^{10 + log} bytes"
    if features & _EXT4_JOURNAL_DEV:
        return "it is only a journal"
    return _beyond((low | (high << 32 if features & _EXT4_64BIT else 0)) << (10 + log), size)


def _beyond(used: int, size: int) -> str:
    return f"it has {used} bytes, and the file only {size}: is it whole?" if used > size else ""


_CHECKS: Mapping[str, Callable[[bytes, int], str]] = {
    "squashfs": _wrong_with_squashfs, "erofs": _wrong_with_erofs, "ext4": _wrong_with_ext4,
}  # fmt: skip
