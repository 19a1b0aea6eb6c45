"""Merges the entries of layers into one tree, as applying one after the other would do it (image-spec, layer.md).

Only names and metadata are here; data stays in the layers, and nothing of this touches the host's filesystem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attrs import define, evolve, field, frozen

from pykata.images.entry import BadEntryError, Entry, Kind

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."             # what aufs kept for itself, and old Docker put into layers: not files of the image


@frozen(eq=False)
class Inode:
    """A file with all its names. Its data is in layer ``layer``."""

    entry: Entry
    layer: int


@define(eq=False)
class Node:
    """A name in the tree; ``inode`` None is a directory nobody described.

    ``layer`` is the topmost layer that has it, ``opaque`` the topmost one that hid everything below it.
    """

    inode: Inode | None
    layer: int
    children: dict[bytes, Node] | None = None
    opaque: int = -1


@define
class Tree:
    """The merged tree. Feed it the layers from the lowest to the topmost with :meth:`apply`."""

    root: Node = field(factory=lambda: Node(None, -1, {}))

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
        if entry.kind is Kind.HARDLINK:
            target = self.find(entry.link)
            if target is None or target.inode is None or target.children is not None:
                raise BadEntryError(f"it is a hard link to {_show(entry.link)}, which isn't a file")
            inode = target.inode
        else:
            inode = Inode(entry, layer)
        directory = self._enter(layer, parents)
        existing = directory.get(name)
        if entry.kind is not Kind.DIRECTORY:
            directory[name] = Node(inode, layer)
        elif existing is None or existing.children is None:
            directory[name] = Node(inode, layer, {})
        else:
            existing.inode, existing.layer = inode, layer

    def find(self, path: bytes) -> Node | None:
        """The node at a path; symlinks are not followed."""
        node = self.root
        for part in path.split(b"/") if path else ():
            child = node.children.get(part) if node.children is not None else None
            if child is None:
                return None
            node = child
        return node

    def _enter(self, layer: int, path: bytes) -> dict[bytes, Node]:
        """The children of the directory at ``path``; what is missing of it is made."""
        node = self.root
        for part in path.split(b"/") if path else ():
            assert node.children is not None
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = Node(None, layer, {})
            elif child.children is None:
                what = child.inode.entry.kind.name.lower() if child.inode is not None else "file"
                raise BadEntryError(f"{_show(part)} in its path is a {what}, not a directory")
            node = child
        assert node.children is not None
        return node.children

    def _white_out(self, layer: int, parents: bytes, name: bytes) -> None:
        hidden = name[len(WHITEOUT):]
        if hidden in (b"", b".", b".."):
            raise BadEntryError("it is a whiteout of no name")
        directory = self.find(parents)
        if directory is None or directory.children is None:
            return
        if name == OPAQUE:
            _hide_lower(layer, directory)
        elif not name.startswith(_AUFS):
            child = directory.children.get(hidden)
            if child is not None and not _hide_lower(layer, child):
                del directory.children[hidden]


def _hide_lower(layer: int, top: Node) -> bool:
    """Remove what lower layers have below ``top``; returns whether ``top`` itself has something of this layer.

    A whiteout is about lower layers only, wherever it stands among the entries of its own. What was cleared once isn't
    visited again, so that a layer of many whiteouts takes no more time than one of as many files.
    """
    order, stack = [top], [top]
    while stack:
        node = stack.pop()
        if node.children and node.opaque != layer:
            order.extend(node.children.values())
            stack.extend(node.children.values())
    for node in reversed(order):        # children come after their parents
        if node.children is not None and node.opaque != layer:
            node.children = {name: child for name, child in node.children.items() if _is_of(layer, child)}
            node.opaque = layer
    return _is_of(layer, top)


def _is_of(layer: int, node: Node) -> bool:
    return node.layer == layer or bool(node.children)


@frozen
class Plan:
    """What to write: first ``heads``, which have no data, then ``files`` by layer as their data comes, then ``links``.

    A file that is left under several names is written under the first of them, and the others are links to it.
    """

    heads: list[Entry]
    files: dict[int, list[Entry]]
    links: list[Entry]


def plan(tree: Tree) -> Plan:
    """Order the tree for writing: the same tree always gives the same order."""
    heads: list[Entry] = []
    files: dict[int, list[Entry]] = {}
    links: list[Entry] = []
    first: dict[int, bytes] = {}
    for path, node in walk(tree):
        if node.inode is None:
            heads.append(Entry(path, Kind.DIRECTORY, mode=0o755))
            continue
        inode = node.inode
        if node.children is None:
            target = first.setdefault(id(inode), path)
            if target is not path:
                links.append(evolve(inode.entry, path=path, kind=Kind.HARDLINK, link=target, size=0, stored=0,
                                    extents=None, device=(0, 0), xattrs=()))
                continue
        entry = inode.entry if inode.entry.path == path else evolve(inode.entry, path=path)
        if entry.stored:
            files.setdefault(inode.layer, []).append(entry)
        else:
            heads.append(entry)
    for entries in files.values():
        entries.sort(key=lambda entry: entry.offset)
    return Plan(heads, files, links)


def walk(tree: Tree) -> Iterator[tuple[bytes, Node]]:
    """Every path with its node, each directory before what is in it, sorted by name."""
    stack: list[tuple[bytes, Node]] = [(b"", tree.root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        if node.children:
            prefix = path + b"/" if path else b""
            stack.extend((prefix + name, child) for name, child in sorted(node.children.items(), reverse=True))


def _show(path: bytes) -> str:
    return repr(path[:200].decode("utf-8", "backslashreplace"))
