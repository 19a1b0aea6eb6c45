"""Writes a cpio archive of the "newc" kind (Linux: Documentation/driver-api/early-userspace/buffer-format.rst)."""

from __future__ import annotations

import stat
from collections.abc import Iterable

from attrs import frozen


@frozen
class Entry:
    """A file of the archive. ``mode`` has the type, too: ``stat.S_IFREG | 0o755``."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    """An empty directory."""
    return Entry(name, stat.S_IFDIR | mode)


def program(name: str, data: bytes) -> Entry:
    """A file that can be executed."""
    return Entry(name, stat.S_IFREG | 0o755, data)


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A device node."""
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def newc(entries: Iterable[Entry]) -> bytes:
    """The archive's bytes. The same entries give the same bytes: no times, owners or inode numbers of the host."""
    out = bytearray()
    for inode, entry in enumerate(entries, start=1):
        out += _record(inode, entry)
    out += _record(0, Entry("TRAILER!!!", 0))
    return bytes(_padded(out, 512))


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields)
    return _padded(header + name, 4) + _padded(entry.data, 4)


def _padded(data: bytes | bytearray, size: int) -> bytes:
    return bytes(data) + bytes(-len(data) % size)
