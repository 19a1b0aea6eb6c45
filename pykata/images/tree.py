"""Merges the entries of layers into one tree, as applying one after the other would do it (image-spec, layer.md).

Only names and metadata are here; data stays in the layers, and nothing of this touches the host's filesystem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attrs import define, field, frozen

from pykata.images.entry import BadEntryError, Entry, Kind
from pykata.images.leaf import Inode, Leaf, kind_of, layer_of, leaf_of

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."             # what aufs kept for itself, and old Docker put into layers: not files of the image


@define(eq=False, weakref_slot=False)
class Directory:
    """A directory in the tree; ``inode`` None is one that nobody described.

    ``layer`` is the topmost layer that has it, ``opaque`` the topmost one that hid everything below it.
    """

    inode: Inode | None
    layer: int
    children: dict[bytes, Child] = field(factory=dict)
    opaque: int = -1


@frozen(eq=False)
class Link:
    """A name that layer ``layer`` gave to a file of a lower one."""

    leaf: Leaf
    layer: int


Child = Directory | Link | Leaf


@define
class Tree:
    """The merged tree. Feed it the layers from the lowest to the topmost with :meth:`apply`."""

    root: Directory = field(factory=lambda: Directory(None, -1))
    linked: set[int] = field(factory=set)
    """The identities of all files that may have more than one name."""

    def apply(self, layer: int, entries: Iterable[Entry], *, whiteouts: bool = True) -> None:
        """Put a layer on top. ``whiteouts`` False takes ``.wh.`` names for files, as in a plain archive.

        Raises BadEntryError.
        """
        for entry in entries:
            try:
                self._apply(layer, entry, whiteouts)
            except BadEntryError as exc:
                raise BadEntryError(exc.why, entry.path) from exc

    def _apply(self, layer: int, entry: Entry, whiteouts: bool) -> None:
        parents, _, name = entry.path.rpartition(b"/")
        if whiteouts and WHITEOUT in entry.path:
            if name.startswith(WHITEOUT):
                self._white_out(layer, parents, name)
                return
            if any(part.startswith(_AUFS) for part in parents.split(b"/")):
                return
        if not name:
            if entry.kind is not Kind.DIRECTORY:
                raise BadEntryError("it replaces the root by something that isn't a directory")
            self.root.inode, self.root.layer = Inode(entry, layer), layer
            return
        linked = self._linked(layer, entry.link) if entry.kind is Kind.HARDLINK else None
        directory = self._enter(layer, parents)
        existing = directory.get(name)
        if linked is not None:
            directory[name] = linked
        elif entry.kind is not Kind.DIRECTORY:
            directory[name] = leaf_of(entry, layer)
        elif isinstance(existing, Directory):
            existing.inode, existing.layer = Inode(entry, layer), layer
        else:
            directory[name] = Directory(Inode(entry, layer), layer)

    def _linked(self, layer: int, path: bytes) -> Child:
        """Another name for the file at ``path``."""
        target = self.find(path)
        if target is None or isinstance(target, Directory):
            raise BadEntryError(f"it is a hard link to {_show(path)}, which isn't a file")
        leaf = leaf_under(target)
        self.linked.add(id(leaf))
        return leaf if layer_of(leaf) == layer else Link(leaf, layer)

    def find(self, path: bytes) -> Child | None:
        """What is at a path; symlinks are not followed."""
        found: Child = self.root
        for part in path.split(b"/") if path else ():
            child = found.children.get(part) if isinstance(found, Directory) else None
            if child is None:
                return None
            found = child
        return found

    def _enter(self, layer: int, path: bytes) -> dict[bytes, Child]:
        """The children of the directory at ``path``; what is missing of it is made."""
        directory = self.root
        for part in path.split(b"/") if path else ():
            child = directory.children.get(part)
            if child is None:
                child = directory.children[part] = Directory(None, layer)
            elif not isinstance(child, Directory):
                what = kind_of(leaf_under(child)).name.lower()
                raise BadEntryError(f"{_show(part)} in its path is a {what}, not a directory")
            directory = child
        return directory.children

    def _white_out(self, layer: int, parents: bytes, name: bytes) -> None:
        hidden = name[len(WHITEOUT):]
        if hidden in (b"", b".", b".."):
            raise BadEntryError("it is a whiteout of no name")
        directory = self.find(parents)
        if not isinstance(directory, Directory):
            return
        if name == OPAQUE:
            _hide_lower(layer, directory)
        elif not name.startswith(_AUFS):
            child = directory.children.get(hidden)
            if child is not None and not _hide_lower(layer, child):
                del directory.children[hidden]


def leaf_under(child: Link | Leaf) -> Leaf:
    """The file that a name is of."""
    return child.leaf if isinstance(child, Link) else child


def _hide_lower(layer: int, top: Child) -> bool:
    """Remove what lower layers have below ``top``; returns whether ``top`` itself has something of this layer.

    A whiteout is about lower layers only, wherever it stands among the entries of its own. What was cleared once isn't
    visited again, so that a layer of many whiteouts takes no more time than one of as many files.
    """
    if not isinstance(top, Directory):
        return _is_of(layer, top)
    order, stack = [top], [top]
    while stack:
        directory = stack.pop()
        if directory.opaque != layer:
            below = [child for child in directory.children.values() if isinstance(child, Directory)]
            order.extend(below)
            stack.extend(below)
    for directory in reversed(order):       # children come after their parents
        if directory.opaque != layer:
            directory.children = {name: child for name, child in directory.children.items() if _is_of(layer, child)}
            directory.opaque = layer
    return _is_of(layer, top)


def _is_of(layer: int, child: Child) -> bool:
    if isinstance(child, Directory):
        return child.layer == layer or bool(child.children)
    return (child.layer if isinstance(child, Link) else layer_of(child)) == layer


def walk(tree: Tree) -> Iterator[tuple[bytes, bytes, Child]]:
    """The directory of every name, the name, and what has it; each directory before what is in it, sorted by name."""
    stack: list[tuple[bytes, bytes, Child]] = [(b"", b"", tree.root)]
    while stack:
        parent, name, child = stack.pop()
        yield parent, name, child
        if isinstance(child, Directory) and child.children:
            path = joined(parent, name)
            stack.extend((path, name, below) for name, below in sorted(child.children.items(), reverse=True,
                                                                       key=lambda item: item[0]))


def joined(parent: bytes, name: bytes) -> bytes:
    """The path of a name."""
    return parent + b"/" + name if parent else name


def _show(path: bytes) -> str:
    return repr(path[:200].decode("utf-8", "backslashreplace"))
