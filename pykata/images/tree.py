"""Merges the entries of layers into one tree, as applying one after the other would do it (image-spec, layer.md).

Only names and metadata are here; data stays in the layers, and nothing of this touches the host's filesystem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attrs import define, evolve, field

from pykata.images.entry import BadEntryError, Entry, Kind
from pykata.images.leaf import Inode, Leaf, kind_of, layer_of, leaf_of
from pykata.images.limits import DEFAULT_LIMITS
from pykata.images.nodes import Child, Directory, Link, Nodes

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."             # what aufs kept for itself, and old Docker put into layers: not files of the image


@define
class Tree:
    """The merged tree. Feed it the layers from the lowest to the topmost with :meth:`apply`."""

    nodes: Nodes = field(factory=lambda: Nodes(DEFAULT_LIMITS.memory))
    root: Directory = field(factory=lambda: Directory(0, None, -1))
    _count: int = 0                     # of directories and of files with several names, which are numbered
    _here: tuple[bytes, int] = (b"", 0)
    """The directory that was entered last: what follows is mostly in the same one."""

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
            self.root = evolve(self.root, inode=Inode(entry, layer), layer=layer)
            return
        linked = self._linked(layer, entry.link) if entry.kind is Kind.HARDLINK else None
        directory = self._enter(layer, parents)
        if entry.kind is Kind.DIRECTORY:
            existing = self.nodes.get(directory, name)
            known = existing if isinstance(existing, Directory) else Directory(self._number(), None, layer)
            self.nodes.set(directory, name, evolve(known, inode=Inode(entry, layer), layer=layer))
            return
        if self._here[0].startswith(entry.path):        # it may be a directory that this replaces
            self._here = b"", 0
        self.nodes.set(directory, name, linked or leaf_of(entry, layer))

    def _linked(self, layer: int, path: bytes) -> Link:
        """Another name for the file at ``path``."""
        found = self._find(path)
        target = found and self.nodes.get(*found)
        if found is None or target is None or isinstance(target, Directory):
            raise BadEntryError(f"it is a hard link to {_show(path)}, which isn't a file")
        if not isinstance(target, Link):
            target = Link(target, layer_of(target), self._number())
            self.nodes.set(*found, target)
        return evolve(target, layer=layer)

    def _find(self, path: bytes) -> tuple[int, bytes] | None:
        """The directory that a path is in, and its name there; symlinks are not followed."""
        parents, _, name = path.rpartition(b"/")
        directory = self._directory(parents)
        return None if directory is None or not name else (directory.id, name)

    def _directory(self, path: bytes) -> Directory | None:
        """The directory at a path, if there is one."""
        found = self.root
        for part in path.split(b"/") if path else ():
            child = self.nodes.get(found.id, part)
            if not isinstance(child, Directory):
                return None
            found = child
        return found

    def _enter(self, layer: int, path: bytes) -> int:
        """The directory at ``path``; what is missing of it is made."""
        if path == self._here[0]:
            return self._here[1]
        directory = 0
        for part in path.split(b"/") if path else ():
            child = self.nodes.get(directory, part)
            if child is None:
                child = Directory(self._number(), None, layer)
                self.nodes.set(directory, part, child)
            elif not isinstance(child, Directory):
                what = kind_of(leaf_under(child)).name.lower()
                raise BadEntryError(f"{_show(part)} in its path is a {what}, not a directory")
            directory = child.id
        self._here = path, directory
        return directory

    def _white_out(self, layer: int, parents: bytes, name: bytes) -> None:
        hidden = name[len(WHITEOUT):]
        if hidden in (b"", b".", b".."):
            raise BadEntryError("it is a whiteout of no name")
        directory = self._directory(parents)
        if directory is None or (name != OPAQUE and name.startswith(_AUFS)):
            return
        self._here = b"", 0
        if name == OPAQUE:
            self._hide_lower(layer, directory)
            self._note_opaque(layer, parents, directory)
            return
        child = self.nodes.get(directory.id, hidden)
        if isinstance(child, Directory):
            self._hide_lower(layer, child)
            self._keep(layer, directory.id, hidden, child)
        elif child is not None and not _is_of(layer, child):
            self.nodes.remove(directory.id, hidden)

    def _note_opaque(self, layer: int, path: bytes, directory: Directory) -> None:
        found = self._find(path)
        if found is None:
            self.root = evolve(self.root, opaque=layer)
        else:
            self.nodes.set(*found, evolve(directory, opaque=layer))

    def _hide_lower(self, layer: int, top: Directory) -> None:
        """Remove what lower layers have below ``top``.

        A whiteout is about lower layers only, wherever it stands among the entries of its own. What was cleared once
        isn't visited again, so that a layer of many whiteouts takes no more time than one of as many files.
        """
        if top.opaque == layer:
            return
        stack: list[tuple[int, bytes, Directory, Iterator[tuple[bytes, Child]]]] = [
            (-1, b"", top, self.nodes.list(top.id))]
        while stack:
            above, own, directory, children = stack[-1]
            for name, child in children:
                if isinstance(child, Directory):
                    if child.opaque != layer:
                        stack.append((directory.id, name, child, self.nodes.list(child.id)))
                        break
                    self._keep(layer, directory.id, name, child)
                elif not _is_of(layer, child):
                    self.nodes.remove(directory.id, name)
            else:
                stack.pop()
                if stack:
                    self._keep(layer, above, own, directory)

    def _keep(self, layer: int, above: int, name: bytes, directory: Directory) -> None:
        """Keep a directory that was cleared only if something of this layer is left of it."""
        if directory.layer != layer and not self.nodes.has_any(directory.id):
            self.nodes.remove(above, name)
        elif directory.opaque != layer:
            self.nodes.set(above, name, evolve(directory, opaque=layer))

    def _number(self) -> int:
        self._count += 1
        return self._count


def leaf_under(child: Link | Leaf) -> Leaf:
    """The file that a name is of."""
    return child.leaf if isinstance(child, Link) else child


def _is_of(layer: int, child: Link | Leaf) -> bool:
    return (child.layer if isinstance(child, Link) else layer_of(child)) == layer


def walk(tree: Tree) -> Iterator[tuple[bytes, bytes, Child]]:
    """The directory of every name, the name, and what has it; each directory before what is in it, sorted by name."""
    yield b"", b"", tree.root
    stack: list[tuple[bytes, Iterator[tuple[bytes, Child]]]] = [(b"", tree.nodes.list(0))]
    while stack:
        path, children = stack[-1]
        for name, child in children:
            yield path, name, child
            if isinstance(child, Directory):
                stack.append((joined(path, name), tree.nodes.list(child.id)))
                break
        else:
            stack.pop()


def joined(parent: bytes, name: bytes) -> bytes:
    """The path of a name."""
    return parent + b"/" + name if parent else name


def _show(path: bytes) -> str:
    return repr(path[:200].decode("utf-8", "backslashreplace"))
