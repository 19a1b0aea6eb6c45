"""One entry of a layer, as the parsers find it."""

from __future__ import annotations

from enum import Enum

from attrs import field, frozen

MAX_PATH = 4096         # bytes, PATH_MAX of Linux with its NUL; a longer name can't be opened
MAX_NAME = 255          # bytes of one component, NAME_MAX


class Kind(Enum):
    """What an entry is; the value is its type flag in a tar header (POSIX pax, "ustar Interchange Format")."""

    FILE = b"0"
    HARDLINK = b"1"
    SYMLINK = b"2"
    CHAR = b"3"
    BLOCK = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"


@frozen
class Entry:
    """A file, directory, link or node.

    ``path`` has no leading slash and no empty, ``.`` or ``..`` component; the root is empty. ``link`` is the target of
    a symlink verbatim, or the path of a hard link's target in the same form as ``path``. ``extents`` are the parts of
    a sparse file that have data, as offset and length; ``None`` for an ordinary file. ``stored`` bytes of data are in
    the archive at ``offset``. ``nanoseconds`` belong to ``mtime``; images do without them.
    """

    path: bytes
    kind: Kind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    extents: tuple[tuple[int, int], ...] | None = None
    stored: int = 0
    offset: int = field(default=0, eq=False)
    nanoseconds: int = field(default=0, eq=False)


class BadEntryError(ValueError):
    """An entry of a layer can't be right. ``path`` is the entry, as far as it is known."""

    def __init__(self, why: str, path: bytes = b"") -> None:
        super().__init__(why)
        self.why = why
        self.path = path


def clean_path(raw: bytes) -> bytes:
    """A path of an archive relative to the root, without doubled slashes and ``.``.

    An absolute path is taken relative to the root, as Docker does. ``..`` is refused, also where it would stay inside.
    """
    if len(raw) > MAX_PATH:
        raise BadEntryError(f"its path has {len(raw)} bytes, more than {MAX_PATH}", raw[:MAX_NAME])
    if b"\0" in raw:
        raise BadEntryError("its path has a NUL in it", raw)
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    for part in parts:
        if part == b"..":
            raise BadEntryError("its path has '..' in it", raw)
        if len(part) > MAX_NAME:
            raise BadEntryError(f"a part of its path has {len(part)} bytes, more than {MAX_NAME}", raw[:MAX_NAME])
    return b"/".join(parts)
