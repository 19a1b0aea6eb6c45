"""Extended headers of a tar: records of keys and binary values, and the maps of sparse files.

POSIX.1-2017 pax, "pax Extended Header"; GNU tar manual, "Storing Sparse Files".
"""

from __future__ import annotations

from attrs import field, frozen

from pykata.images.entry import BadEntryError

MAX_HEADER = 1024 * 1024        # bytes; Go's archive/tar, and so Docker, refuses longer ones as well
MAX_EXTENTS = 65536

_XATTR = b"SCHILY.xattr."
OVERLAY = (b"trusted.overlay.", b"user.overlay.")

Extents = tuple[tuple[int, int], ...]


@frozen
class Records:
    """The records of one extended header. ``sparse`` holds the offsets and lengths of GNU's sparse format 0.0."""

    values: dict[bytes, bytes] = field(factory=dict)
    sparse: tuple[int, ...] = ()

    def text(self, key: bytes) -> bytes | None:
        """A value that is a path. An empty one means that there is none (POSIX)."""
        value = self.values.get(key)
        if value is not None and b"\0" in value:
            raise BadEntryError(f"its extended header has a NUL in {key.decode()}")
        return value or None

    def number(self, key: bytes) -> int | None:
        value = self.values.get(key)
        return parse_decimal(value) if value else None

    def seconds(self, key: bytes) -> int | None:
        """A time, rounded down to whole seconds: no filesystem that we make keeps more."""
        value = self.values.get(key)
        if not value:
            return None
        whole, _, fraction = value.partition(b".")
        negative = whole.startswith(b"-")
        seconds = parse_decimal(whole[1:] if negative else whole)
        if not negative:
            return seconds
        return -seconds - bool(fraction.strip(b"0"))

    def nanoseconds(self, key: bytes) -> int:
        """What :meth:`seconds` has left out of a time."""
        fraction = (self.values.get(key) or b"").partition(b".")[2][:9]
        if not fraction.isdigit():
            return 0
        nanoseconds = int(fraction.ljust(9, b"0"))
        return (10**9 - nanoseconds) % 10**9 if self.values[key].startswith(b"-") else nanoseconds

    def xattrs(self) -> tuple[tuple[bytes, bytes], ...]:
        """The extended attributes, but for overlayfs's own: those say where it finds a file, and aren't the image's."""
        return tuple(sorted(
            (name, value) for key, value in self.values.items()
            if (name := key.removeprefix(_XATTR)) != key and not name.startswith(OVERLAY)
        ))


def parse_decimal(raw: bytes) -> int:
    """A decimal number without sign, of at most 19 digits."""
    if not raw.isdigit() or len(raw) > 19:
        raise BadEntryError(f"its header has {raw[:32]!r} where a number should be")
    return int(raw)


def parse_records(raw: bytes) -> Records:
    """Split the body of an extended header: ``LENGTH KEY=VALUE\\n``, where a value may have any bytes in it."""
    values: dict[bytes, bytes] = {}
    sparse: list[int] = []
    at = 0
    while at < len(raw):
        space = raw.find(b" ", at, at + 10)
        if space < 0 and not raw[at:].strip(b"\0"):
            break       # some writers pad with zeros
        digits = raw[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        equals = raw.find(b"=", space, end)
        if end > len(raw) or equals < 0 or raw[end - 1:end] != b"\n":
            raise BadEntryError("its extended header is malformed")
        key, value = raw[space + 1:equals], raw[equals + 1:end - 1]
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (key == b"GNU.sparse.numbytes") != len(sparse) % 2:
                raise BadEntryError("its map of a sparse file is malformed")
            sparse.append(parse_decimal(value))
        values[key] = value
        at = end
    return Records(values, tuple(sparse))


def sparse_map(numbers: tuple[int, ...] | list[int], size: int, stored: int) -> Extents:
    """Check a map given as offset, length, offset, length, ...: ascending, inside the file, and of what is stored."""
    if len(numbers) % 2 or len(numbers) > 2 * MAX_EXTENTS:
        raise BadEntryError("its map of a sparse file is malformed")
    extents = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    at = 0
    for offset, length in extents:
        if offset < at or offset + length > size:
            raise BadEntryError("its map of a sparse file overlaps itself or ends after the file")
        at = offset + length
    if sum(length for _, length in extents) != stored:
        raise BadEntryError("its map of a sparse file isn't about the data that follows")
    return tuple((offset, length) for offset, length in extents if length)
