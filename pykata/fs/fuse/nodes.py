"""The numbers by which a guest's kernel knows files, and what it has open."""

from __future__ import annotations

import errno
import threading
from itertools import count
from sys import getsizeof

from attrs import define, field

from pykata.fs.fuse.tree import File, Stat
from pykata.fs.fuse.wire import MAX_PATH

ROOT = 1
MAX_NODES = 1_000_000
MAX_SIZE = 256 * 1024 * 1024    # bytes of memory for all their paths
MAX_OPEN = 20_000


@define(eq=False)
class Node:
    """A file or directory that the guest knows; ``known`` is how often it was told of it, ``size`` is its path's."""

    number: int
    path: str
    size: int
    known: int = 0


@define(eq=False)
class Handle:
    """Something that is open."""

    file: File | None = None
    listing: list[tuple[str, Stat]] | None = None
    lock: threading.Lock = field(factory=threading.Lock)


class Nodes:
    """All of them. Used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._root = Node(ROOT, "", 0, known=1)
        self._by_number = {ROOT: self._root}
        self._by_path = {"": self._root}
        self._size = 0              # of the paths
        self._numbers = count(ROOT + 1)

    def path(self, number: int) -> str:
        """Where a node is. Raises OSError for a number that the guest wasn't told, and for what was removed."""
        with self._lock:
            node = self._by_number.get(number)
            if node is None or self._by_path.get(node.path) is not node:
                raise OSError(errno.ESTALE, "no such file any more")
            return node.path

    def told(self, path: str) -> int:
        """The number of what is at a path, of which the guest is told now."""
        with self._lock:
            node = self._by_path.get(path)
            if node is None:
                size = getsizeof(path)
                if len(self._by_number) >= MAX_NODES or self._size + size > MAX_SIZE:
                    raise OSError(errno.ENFILE, "too many files are known")
                self._size += size
                node = Node(next(self._numbers), path, size)
                self._by_number[node.number] = self._by_path[path] = node
            node.known += 1
            return node.number

    def forget(self, number: int, times: int) -> None:
        """The guest has forgotten it so many times."""
        with self._lock:
            node = self._by_number.get(number)
            if node is None or node is self._root:
                return
            node.known -= times
            if node.known <= 0:
                del self._by_number[number]
                self._size -= node.size
                if self._by_path.get(node.path) is node:
                    del self._by_path[node.path]

    def removed(self, path: str) -> None:
        """Nothing is at this path any more."""
        with self._lock:
            self._by_path.pop(path, None)

    def moved(self, old: str, new: str) -> None:
        """What was at a path, and all below it, is at another one.

        What has too long a path then, or one that there is no room for, is known no more.
        """
        with self._lock:
            self._by_path.pop(new, None)
            for path in [path for path in self._by_path if path == old or path.startswith(f"{old}/")]:
                node = self._by_path.pop(path)
                moved = new + path[len(old):]
                more = (size := getsizeof(moved)) - node.size
                if not is_too_long(moved) and (more <= 0 or self._size + more <= MAX_SIZE):
                    node.path, node.size = moved, size
                    self._size += more
                    self._by_path[moved] = node


def is_too_long(path: str) -> bool:
    """Whether it is a path that nobody keeps for a guest, which could go down and down."""
    return len(path.encode()) > MAX_PATH


class Handles:
    """What is open, by number. Used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, Handle] = {}
        self._numbers = count(1)

    def add(self, handle: Handle) -> int:
        """A number for it. Raises OSError."""
        with self._lock:
            if len(self._open) >= MAX_OPEN:
                raise OSError(errno.ENFILE, "too many files are open")
            number = next(self._numbers)
            self._open[number] = handle
            return number

    def get(self, number: int) -> Handle:
        """Raises OSError."""
        handle = self._open.get(number)
        if handle is None:
            raise OSError(errno.EBADF, "it isn't open")
        return handle

    def file(self, number: int) -> tuple[Handle, File]:
        """One that is a file. Raises OSError."""
        handle = self.get(number)
        if handle.file is None:
            raise OSError(errno.EBADF, "it isn't an open file")
        return handle, handle.file

    def drop(self, number: int) -> Handle | None:
        """It is closed."""
        with self._lock:
            return self._open.pop(number, None)

    def drop_all(self) -> list[Handle]:
        """Everything is closed."""
        with self._lock:
            left, self._open = list(self._open.values()), {}
            return left
