"""Reads the entries of a tar as a stream: ustar, pax, GNU and old tars, of any writer and of any intent.

It never opens, creates or follows anything; it only says what the archive has. tarfile would do for friendly archives,
but it guesses where a header is damaged, expands the holes of sparse files, and parses pax records with a regular
expression that takes quadratic time (CVE-2024-6232).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from pykata.images.entry import MAX_PATH, BadEntryError, Entry, Kind, clean_path
from pykata.images.pax import MAX_EXTENTS, MAX_HEADER, Records, parse_decimal, parse_records, sparse_map
from pykata.images.stream import StreamError

BLOCK = 512
MAX_ID = 2**32 - 2              # the last one is "no change" for chown(2)
MAX_SIZE = 2**62

_ZEROS = bytes(BLOCK)
_KINDS = {kind.value: kind for kind in Kind} | {b"\0": Kind.FILE, b"7": Kind.FILE, b"S": Kind.FILE}


class Source(Protocol):
    """What a TarReader needs of a :class:`~pykata.images.stream.Reader`."""

    @property
    def position(self) -> int: ...
    def read(self, count: int) -> bytes: ...
    def pieces(self, count: int) -> Iterator[memoryview]: ...
    def skip(self, count: int) -> None: ...
    def at_end(self) -> bool: ...


class TarReader:
    """Iterates over the entries. Data that the caller leaves in place (see :meth:`data`) is skipped."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._data = 0          # bytes of the current entry that weren't read yet
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        while (header := self._header()) is not None:
            entry = self._entry(header)
            if entry is not None:
                yield entry

    def data(self) -> Iterator[memoryview]:
        """The data of the entry that was yielded last: of a sparse file only what its extents have."""
        for piece in self._source.pieces(self._data):
            self._data -= len(piece)
            yield piece

    def leave_data(self) -> int:
        """How much that is: the caller takes all of it from the source himself."""
        size, self._data = self._data, 0
        return size

    def _header(self) -> bytes | None:
        self._source.skip(self._data)
        try:
            self._source.skip(self._padding)
        except StreamError:
            return None         # without what fills the last block; umoci inserts such layers, Go takes them
        self._data = self._padding = 0
        if self._source.at_end():
            return None         # without the two blocks of zeros that POSIX wants; Go and GNU tar take it, too
        header = self._source.read(BLOCK)
        if header == _ZEROS:
            if not self._source.at_end() and self._source.read(BLOCK) != _ZEROS:
                raise BadEntryError("a lone block of zeros is between two entries")
            return None
        _verify(header)
        return header

    def _follows(self, size: int) -> None:
        self._data, self._padding = size, -size % BLOCK

    def _body(self, header: bytes) -> bytes:
        size = _number(header[124:136])
        if size > MAX_HEADER:
            raise BadEntryError(f"an extended header has {size} bytes, more than {MAX_HEADER}")
        return self._source.read(size + -size % BLOCK)[:size]

    def _entry(self, header: bytes) -> Entry | None:
        records, long_path, long_link = Records(), None, None
        while (flag := header[156:157]) in b"xXgLK":
            body = self._body(header)
            if flag in b"xX":
                records = parse_records(body)
            elif flag == b"L":
                long_path = body.split(b"\0", 1)[0]
            elif flag == b"K":
                long_link = body.split(b"\0", 1)[0]
            # A global header (g) is read over, as Docker does: git and others write comments there.
            following = self._header()
            if following is None:
                if flag == b"g":
                    return None
                raise BadEntryError("an extended header is the last of the archive")
            header = following
        path = records.text(b"path") or long_path or _path(header)
        try:
            return self._resolve(header, path, records, long_link)
        except BadEntryError as exc:
            raise exc if exc.path else BadEntryError(exc.why, path[:MAX_PATH]) from exc

    def _resolve(self, header: bytes, path: bytes, records: Records, long_link: bytes | None) -> Entry:
        flag = header[156:157]
        kind = _KINDS.get(flag)
        if kind is None:
            raise BadEntryError(f"its type {flag!r} is none that a layer can have", path)
        if flag == b"\0" and path.endswith(b"/"):
            kind = Kind.DIRECTORY       # before ustar that was how a directory was told
        stored, size, extents = 0, 0, None
        if kind is Kind.FILE:           # of everything else the size means nothing: no data follows (Go, GNU tar)
            number = records.number(b"size")
            stored = size = _number(header[124:136]) if number is None else number
            if size > MAX_SIZE:
                raise BadEntryError(f"its size of {size} bytes can't be", path)
            self._follows(stored)
            if flag == b"S":
                size, extents = self._old_sparse(header)
            elif any(key.startswith(b"GNU.sparse.") for key in records.values):
                size, extents = self._pax_sparse(records)
                path = records.text(b"GNU.sparse.name") or path
            stored = self._data
        return Entry(
            path=clean_path(path), kind=kind, size=size, extents=extents, stored=stored,
            mode=_number(header[100:108]) & 0o7777,
            uid=_identity(records.number(b"uid"), header[108:116]),
            gid=_identity(records.number(b"gid"), header[116:124]),
            mtime=_number(header[136:148]) if (mtime := records.seconds(b"mtime")) is None else mtime,
            link=_link(kind, records.text(b"linkpath") or long_link or _text(header[157:257])),
            device=_device(header) if kind in (Kind.CHAR, Kind.BLOCK) else (0, 0),
            xattrs=records.xattrs(), offset=self._source.position, nanoseconds=records.nanoseconds(b"mtime"),
        )

    def _old_sparse(self, header: bytes) -> tuple[int, tuple[tuple[int, int], ...]]:
        # GNU's own type S: 4 extents in the header, 21 in each block that follows it.
        numbers = _extents(header[386:482])
        more = header[482]
        while more:
            block = self._source.read(BLOCK)
            numbers += _extents(block[:504])
            more = block[504]
            if len(numbers) > 2 * MAX_EXTENTS:
                raise BadEntryError(f"its map of a sparse file has more than {MAX_EXTENTS} parts")
        size = _number(header[483:495])
        return size, sparse_map(numbers, size, self._data)

    def _pax_sparse(self, records: Records) -> tuple[int, tuple[tuple[int, int], ...]]:
        version = records.values.get(b"GNU.sparse.major"), records.values.get(b"GNU.sparse.minor")
        size = records.number(b"GNU.sparse.realsize")
        if size is None:
            size = records.number(b"GNU.sparse.size")
        if size is None:
            raise BadEntryError("it is sparse, but its real size is missing")
        if version == (b"1", b"0"):
            return size, sparse_map(self._map_in_data(), size, self._data)
        if (text := records.values.get(b"GNU.sparse.map")) is not None:                     # 0.1
            return size, sparse_map([parse_decimal(number) for number in text.split(b",")] if text else [],
                                    size, self._data)
        return size, sparse_map(records.sparse, size, self._data)                           # 0.0

    def _map_in_data(self) -> list[int]:
        # Version 1.0: decimal numbers, one on each line, the first is how many pairs follow; padded to a block.
        text, lines, wanted = b"", 0, 1
        while lines < wanted:
            if self._data < BLOCK or len(text) > 48 * MAX_EXTENTS:
                raise BadEntryError("its map of a sparse file is malformed")
            block = self._source.read(BLOCK)
            self._data -= BLOCK
            text += block
            lines += block.count(b"\n")
            if wanted == 1 and lines:
                wanted = 1 + 2 * min(parse_decimal(text.split(b"\n", 1)[0]), MAX_EXTENTS + 1)
        return [parse_decimal(line) for line in text.split(b"\n", wanted)[1:wanted]]


def _verify(header: bytes) -> None:
    # The sum of all bytes with the checksum's own taken as blanks; some old tars summed them as signed.
    blanked = header[:148] + b" " * 8 + header[156:]
    total = sum(blanked)
    try:
        want = _number(header[148:156])
    except BadEntryError:
        want = -1
    if want != total and want != total - 256 * sum(byte > 127 for byte in blanked):
        raise BadEntryError("a header's checksum is wrong")


def _number(raw: bytes) -> int:
    """A number of a header: octal digits, or (GNU) big-endian with the top bit of the first byte set."""
    if raw[0] & 0x80:
        bits = 8 * len(raw) - 1
        value = int.from_bytes(raw, "big") & ((1 << bits) - 1)
        value -= (value >> (bits - 1)) << bits
    else:
        digits = raw.replace(b"\0", b" ").strip()
        try:
            value = int(digits, 8) if digits else 0
        except ValueError:
            value = -1
        if value < 0 or b"_" in digits:
            raise BadEntryError(f"its header has {digits!r} where a number should be")
    return value


def _identity(given: int | None, raw: bytes) -> int:
    value = _number(raw) if given is None else given
    if not 0 <= value <= MAX_ID:
        raise BadEntryError(f"its owner {value} is none that Linux can have")
    return value


def _device(header: bytes) -> tuple[int, int]:
    major, minor = _number(header[329:337]), _number(header[337:345])
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):     # linux/kdev_t.h, new_encode_dev
        raise BadEntryError(f"its device number {major}:{minor} is none that Linux can have")
    return major, minor


def _extents(raw: bytes) -> list[int]:
    numbers: list[int] = []
    for at in range(0, len(raw), 24):
        if not raw[at]:
            break
        numbers += _number(raw[at:at + 12]), _number(raw[at + 12:at + 24])
    return numbers


def _text(raw: bytes) -> bytes:
    return raw.split(b"\0", 1)[0]


def _path(header: bytes) -> bytes:
    name = _text(header[:100])
    prefix = b""
    if header[257:263] == b"ustar\0":       # in GNU's own format ("ustar  ") there are times where the prefix would be
        prefix = _text(header[345:476] if header[508:512] == b"tar\0" else header[345:500])
    return prefix + b"/" + name if prefix else name


def _link(kind: Kind, raw: bytes) -> bytes:
    if kind is Kind.HARDLINK:
        return clean_path(raw)
    if kind is not Kind.SYMLINK:
        return b""
    if not raw or len(raw) >= MAX_PATH:
        raise BadEntryError(f"it is a symlink to a name of {len(raw)} bytes")
    return raw
