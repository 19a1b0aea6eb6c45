"""Entries as a tar that every reader understands: ustar where it fits, pax records (POSIX) where it doesn't."""

from __future__ import annotations

from pykata.images.entry import Entry, Kind
from pykata.images.tar_reader import BLOCK

END = bytes(2 * BLOCK)
_EXTRA = Entry(b"", Kind.FILE)
_OCTAL7 = 0o7777777
_OCTAL11 = 0o77777777777


def header(entry: Entry, *, exact: bool = False) -> bytes:
    """The header blocks of an entry. Its data follows, if it has any, and :func:`padding`.

    ``exact`` keeps the nanoseconds of its time.
    """
    records: list[tuple[bytes, bytes]] = []
    size, name = entry.stored, entry.path or b"."
    sparse_block = b""
    if entry.kind is Kind.DIRECTORY:
        name += b"/"
    if entry.extents is not None:
        # As GNU tar does it, an empty extent marks the end of a file that has a hole there. tar2sqfs wants one.
        sparse_block = _map((*entry.extents, (entry.size, 0)))
        size += len(sparse_block)
        records += [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", name),
                    (b"GNU.sparse.realsize", b"%d" % entry.size)]
        name = b"GNUSparseFile.0"
    for key, value, most in ((b"path", name, 100), (b"linkpath", entry.link, 100)):
        if len(value) > most:
            records.append((key, value))
    for key, number, limit in (
        (b"uid", entry.uid, _OCTAL7), (b"gid", entry.gid, _OCTAL7), (b"size", size, _OCTAL11),
        (b"mtime", entry.mtime, _OCTAL11),
    ):
        if exact and key == b"mtime" and entry.nanoseconds:
            records.append((key, _time(entry.mtime, entry.nanoseconds)))
        elif not 0 <= number <= limit:
            records.append((key, b"%d" % number))
    records += [(b"SCHILY.xattr." + key, value) for key, value in entry.xattrs]
    main = _block(entry, name, entry.kind.value, size)
    if not records:
        return main
    body = b"".join(_record(key, value) for key, value in records)
    extra = _block(_EXTRA, b"PaxHeader", b"x", len(body))
    return extra + body + padding(len(body)) + main + sparse_block


def padding(size: int) -> bytes:
    """The zeros that fill the last block of ``size`` bytes of data."""
    return bytes(-size % BLOCK)


def _block(entry: Entry, name: bytes, flag: bytes, size: int) -> bytes:
    block = b"".join((
        name[:100].ljust(100, b"\0"), b"%07o\0" % entry.mode, _octal(entry.uid, 8), _octal(entry.gid, 8),
        _octal(size, 12), _octal(max(entry.mtime, 0), 12), b" " * 8, flag, entry.link[:100].ljust(100, b"\0"),
        b"ustar\x0000", bytes(64), b"%07o\0%07o\0" % entry.device, bytes(167),
    ))
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _octal(value: int, width: int) -> bytes:
    # What doesn't fit is in a pax record, and the field means nothing.
    digits = b"%0*o\0" % (width - 1, value)
    return digits if len(digits) == width else b"%0*o\0" % (width - 1, 0)


def _time(seconds: int, nanoseconds: int) -> bytes:
    if seconds >= 0:
        return b"%d.%09d" % (seconds, nanoseconds)
    return b"-%d.%09d" % (-seconds - 1, 10**9 - nanoseconds)


def _record(key: bytes, value: bytes) -> bytes:
    # The length counts its own digits (POSIX).
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _map(extents: tuple[tuple[int, int], ...]) -> bytes:
    numbers = [len(extents), *(number for extent in extents for number in extent)]
    text = b"".join(b"%d\n" % number for number in numbers)
    return text + padding(len(text))
