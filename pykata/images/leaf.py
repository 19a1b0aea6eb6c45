"""What the tree keeps of a file: a few packed bytes, for an image may have a million files.

An :class:`Inode` with its entry takes ten times as much; it is for what is seldom: symlinks, devices, sparse files, and
those with extended attributes. Either way the *object* is the file's identity: hard links share it.
"""

from __future__ import annotations

import struct

from attrs import evolve, frozen

from pykata.images.entry import Entry, Kind

_PLAIN = struct.Struct("<HHIIqQQ")      # layer, mode, uid, gid, mtime, size, offset


@frozen(eq=False)
class Inode:
    """A file, or the metadata of a directory. Its data is in layer ``layer``."""

    entry: Entry
    layer: int


Leaf = Inode | bytes


def leaf_of(entry: Entry, layer: int) -> Leaf:
    """A file with its data in ``layer``."""
    if entry.kind is not Kind.FILE or entry.xattrs or entry.extents is not None or entry.size != entry.stored:
        return Inode(entry, layer)
    try:
        return _PLAIN.pack(layer, entry.mode, entry.uid, entry.gid, entry.mtime, entry.size, entry.offset)
    except struct.error:        # a time that doesn't fit
        return Inode(entry, layer)


def entry_of(leaf: Leaf, path: bytes) -> Entry:
    """The entry of a file under this name."""
    if isinstance(leaf, Inode):
        return leaf.entry if leaf.entry.path == path else evolve(leaf.entry, path=path)
    _, mode, uid, gid, mtime, size, offset = _PLAIN.unpack(leaf)
    return Entry(path, Kind.FILE, mode, uid, gid, mtime, size, stored=size, offset=offset)


def layer_of(leaf: Leaf) -> int:
    return leaf.layer if isinstance(leaf, Inode) else int.from_bytes(leaf[:2], "little")


def kind_of(leaf: Leaf) -> Kind:
    return leaf.entry.kind if isinstance(leaf, Inode) else Kind.FILE


def stored_of(leaf: Leaf) -> int:
    """How many bytes of data its layer has of it."""
    return leaf.entry.stored if isinstance(leaf, Inode) else int.from_bytes(leaf[20:28], "little")


def offset_of(leaf: Leaf) -> int:
    """Where in its layer they are."""
    return leaf.entry.offset if isinstance(leaf, Inode) else int.from_bytes(leaf[28:], "little")
