"""The order in which a merged tree is written, so that each layer is read once more, from its start to its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from attrs import define, evolve, field, frozen

from pykata.images.entry import Entry, Kind
from pykata.images.leaf import Leaf, entry_of, layer_of, offset_of, stored_of
from pykata.images.nodes import Child, Directory, Link
from pykata.images.tree import Tree, joined, leaf_under, walk


class Order(Protocol):
    """What has to be put into another order than the tree's."""

    def first(self, file: int, path: bytes) -> bytes:
        """The path that a file with several names was first asked for by."""

    def add_file(self, layer: int, place: int, parent: bytes, name: bytes, leaf: Leaf) -> None:
        """A file whose data is at ``place`` in a layer."""

    def files(self, layer: int) -> Iterator[tuple[bytes, Leaf]]:
        """The files of a layer, in the order of their places."""

    def has_files(self, layer: int) -> bool: ...

    def add_link(self, path: bytes, target: bytes, leaf: Leaf) -> None: ...

    def links(self) -> Iterator[tuple[bytes, bytes, Leaf]]:
        """Path, target and file, as they were added."""


@define
class Held:
    """An :class:`Order` in memory; the one on disk is a database."""

    _first: dict[int, bytes] = field(factory=dict)
    _files: dict[int, list[tuple[int, bytes, bytes, Leaf]]] = field(factory=dict)
    _links: list[tuple[bytes, bytes, Leaf]] = field(factory=list)

    def first(self, file: int, path: bytes) -> bytes:
        return self._first.setdefault(file, path)

    def add_file(self, layer: int, place: int, parent: bytes, name: bytes, leaf: Leaf) -> None:
        self._files.setdefault(layer, []).append((place, parent, name, leaf))

    def files(self, layer: int) -> Iterator[tuple[bytes, Leaf]]:
        files = self._files[layer]
        files.sort(key=lambda file: file[0])
        for _, parent, name, leaf in files:
            yield joined(parent, name), leaf

    def has_files(self, layer: int) -> bool:
        return layer in self._files

    def add_link(self, path: bytes, target: bytes, leaf: Leaf) -> None:
        self._links.append((path, target, leaf))

    def links(self) -> Iterator[tuple[bytes, bytes, Leaf]]:
        return iter(self._links)


@frozen
class Plan:
    """What to write: first ``heads``, which have no data, then ``files`` by layer as their data comes, then ``links``.

    A file that is left under several names is written under the first of them, and the others are links to it. Entries
    are made as they are asked for: those of a large image don't fit into memory at once.
    """

    tree: Tree
    order: Order

    def heads(self) -> Iterator[Entry]:
        """Directories, empty files, symlinks, devices."""
        for parent, name, child in walk(self.tree):
            if isinstance(child, Directory):
                path = joined(parent, name)
                yield entry_of(child.inode, path) if child.inode is not None else _nobody_described(path)
            elif not stored_of(leaf_under(child)):
                path = joined(parent, name)
                if not isinstance(child, Link) or self.order.first(child.file, path) == path:
                    yield entry_of(leaf_under(child), path)

    def has_files(self, layer: int) -> bool:
        """Whether anything of a layer's data is left."""
        return self.order.has_files(layer)

    def files(self, layer: int) -> Iterator[Entry]:
        """The files with data in a layer, in the order of that."""
        for path, leaf in self.order.files(layer):
            yield entry_of(leaf, path)

    def links(self) -> Iterator[Entry]:
        """The further names of files."""
        for path, target, leaf in self.order.links():
            yield evolve(entry_of(leaf, path), kind=Kind.HARDLINK, link=target, size=0, stored=0, extents=None,
                         device=(0, 0), xattrs=())

    def add(self, parent: bytes, name: bytes, child: Child) -> None:
        """Take the next name of the tree into account."""
        if isinstance(child, Directory):
            return
        leaf = leaf_under(child)
        if isinstance(child, Link):
            path = joined(parent, name)
            target = self.order.first(child.file, path)
            if target != path:
                self.order.add_link(path, target, leaf)
                return
        if stored_of(leaf):
            self.order.add_file(layer_of(leaf), offset_of(leaf), parent, name, leaf)


def plan(tree: Tree) -> Plan:
    """Order the tree for writing: the same tree always gives the same order."""
    made = Plan(tree, tree.nodes.disk or Held())
    for parent, name, child in walk(tree):
        made.add(parent, name, child)
    return made


def _nobody_described(path: bytes) -> Entry:
    return Entry(path, Kind.DIRECTORY, mode=0o755)
