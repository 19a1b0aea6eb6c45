"""What the tree keeps of all its names: in memory while they are few, and beyond that in a database on disk.

So an image of a million files takes no more memory than one of a hundred thousand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from operator import itemgetter
from types import TracebackType
from typing import TYPE_CHECKING, Self

from attrs import define, field, frozen

from pykata.images.leaf import Inode, Leaf

if TYPE_CHECKING:
    from pykata.images.nodes_disk import Database

_NODE = 260             # bytes that a name takes in memory, without what makes it long; measured
_DIRECTORY = 900        # a directory, with the dictionary of what is in it


@frozen(eq=False)
class Directory:
    """A directory in the tree; ``inode`` None is one that nobody described.

    ``layer`` is the topmost layer that has it, ``opaque`` the topmost one that hid everything below it. What is in it
    is known by its ``id``.
    """

    id: int
    inode: Inode | None
    layer: int
    opaque: int = -1


@frozen(eq=False)
class Link:
    """A name of a file that has several, and the layer that gave it. ``file`` tells which file it is."""

    leaf: Leaf
    layer: int
    file: int


Child = Directory | Link | Leaf


@define(eq=False)
class Nodes:
    """What is in each directory, by the directory's id and by name.

    ``memory`` bounds the bytes that are held at a time, roughly: what is beyond goes to disk, with a third of it as a
    cache. To be closed.
    """

    memory: int
    _held: dict[int, dict[bytes, Child | None]] = field(factory=dict)       # None: removed, but still on disk
    _weight: int = 0
    _disk: Database | None = None
    _stack: ExitStack = field(factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def disk(self) -> Database | None:
        """Where everything is if it was too much for memory."""
        if self._disk is not None:
            self._spill()
        return self._disk

    def get(self, directory: int, name: bytes) -> Child | None:
        """What has this name, if anything has."""
        held = self._held.get(directory)
        if held is not None and name in held:
            return held[name]
        if self._disk is None:
            return None
        found = self._disk.get(directory, name)
        if isinstance(found, Directory):
            self.set(directory, name, found)        # more below it will be asked for
        return found

    def set(self, directory: int, name: bytes, child: Child | None) -> None:
        """Give something this name."""
        if self._weight > self.memory:
            self._spill()
        held = self._held.get(directory)
        if held is None:
            held = self._held[directory] = {}
        held[name] = child
        self._weight += _NODE + len(name) if isinstance(child, bytes) else _weight(child)

    def remove(self, directory: int, name: bytes) -> None:
        """Take a name away."""
        if self._disk is not None:
            self.set(directory, name, None)
        else:
            self._held[directory].pop(name, None)

    def list(self, directory: int) -> Iterator[tuple[bytes, Child]]:
        """All names in a directory, sorted. What is removed or changed meanwhile must be before what comes next."""
        if self._disk is None:
            found = [(name, child) for name, child in self._held.get(directory, {}).items() if child is not None]
            yield from sorted(found, key=itemgetter(0))
            return
        after: bytes | None = b""
        while after is not None:
            self._spill()
            some, after = self._disk.list(directory, after)
            yield from some

    def has_any(self, directory: int) -> bool:
        """Whether anything is in a directory."""
        if self._disk is None:
            return bool(self._held.get(directory))
        return next(self.list(directory), None) is not None

    def _spill(self) -> None:
        if self._held:
            if self._disk is None:
                from pykata.images.nodes_disk import opened

                self._disk = self._stack.enter_context(opened(self.memory // 3))
            self._disk.update(self._held)
            self._held, self._weight = {}, 0


def _weight(child: Child | None) -> int:
    if isinstance(child, Directory):
        return _DIRECTORY + _weight(child.inode)
    if isinstance(child, Link):
        return _NODE + _weight(child.leaf)
    if isinstance(child, Inode):
        entry = child.entry
        xattrs = sum(len(name) + len(value) + 200 for name, value in entry.xattrs)
        return 2 * _NODE + len(entry.path) + len(entry.link) + xattrs + 120 * len(entry.extents or ())
    return _NODE
