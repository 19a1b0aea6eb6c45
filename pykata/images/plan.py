"""The order in which a merged tree is written, so that each layer is read once more, from its start to its end."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve, field, frozen

from pykata.images.entry import Entry, Kind
from pykata.images.leaf import Leaf, entry_of, layer_of, offset_of, stored_of
from pykata.images.tree import Child, Directory, Tree, joined, leaf_under, walk

_Named = tuple[bytes, bytes, Leaf]      # a directory, a name in it, and the file


@frozen
class Plan:
    """What to write: first ``heads``, which have no data, then ``files`` by layer as their data comes, then ``links``.

    A file that is left under several names is written under the first of them, and the others are links to it. Entries
    are made as they are asked for: those of a large image don't fit into memory at once.
    """

    tree: Tree
    links: list[Entry] = field(factory=list)
    _first: dict[int, bytes] = field(factory=dict)
    _files: dict[int, list[_Named]] = field(factory=dict)

    def heads(self) -> Iterator[Entry]:
        """Directories, empty files, symlinks, devices."""
        for parent, name, child in walk(self.tree):
            path = joined(parent, name)
            if isinstance(child, Directory):
                yield entry_of(child.inode, path) if child.inode is not None else _nobody_described(path)
            elif self._is_head(path, leaf_under(child)):
                yield entry_of(leaf_under(child), path)

    def has_files(self, layer: int) -> bool:
        """Whether anything of a layer's data is left."""
        return layer in self._files

    def files(self, layer: int) -> Iterator[Entry]:
        """The files with data in a layer, in the order of that."""
        for parent, name, leaf in self._files[layer]:
            yield entry_of(leaf, joined(parent, name))

    def _is_head(self, path: bytes, leaf: Leaf) -> bool:
        return not stored_of(leaf) and self._first.get(id(leaf), path) == path

    def add(self, parent: bytes, name: bytes, child: Child) -> None:
        """Take the next name of the tree into account."""
        if isinstance(child, Directory):
            return
        leaf = leaf_under(child)
        if id(leaf) in self.tree.linked:
            path = joined(parent, name)
            target = self._first.setdefault(id(leaf), path)
            if target != path:
                self.links.append(evolve(entry_of(leaf, path), kind=Kind.HARDLINK, link=target, size=0, stored=0,
                                         extents=None, device=(0, 0), xattrs=()))
                return
        if stored_of(leaf):
            self._files.setdefault(layer_of(leaf), []).append((parent, name, leaf))

    def sort(self) -> None:
        """Bring the files into the order of their data."""
        for files in self._files.values():
            files.sort(key=lambda named: offset_of(named[2]))


def plan(tree: Tree) -> Plan:
    """Order the tree for writing: the same tree always gives the same order."""
    made = Plan(tree)
    for parent, name, child in walk(tree):
        made.add(parent, name, child)
    made.sort()
    return made


def _nobody_described(path: bytes) -> Entry:
    return Entry(path, Kind.DIRECTORY, mode=0o755)
