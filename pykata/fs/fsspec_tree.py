"""The files of an fsspec filesystem, for a guest.

What fsspec promises is little: whole files, written from their start to their end. A guest writes anywhere. So a file
that is written to is kept in memory as a whole, and handed over when it is closed.
"""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from typing import IO, Any

from attrs import define, field

from pykata.fs.fsspec_directories import EmptyDirectories, is_below, move, parent
from pykata.fs.fuse.nodes import is_too_long
from pykata.fs.fuse.tree import File, Room, Stat
from pykata.fs.fuse.wire import MAX_NAME
from pykata.fs.quota import Quota

CHUNK = 1024 * 1024


@define(eq=False)
class _Node:
    """A file that is open, for all who have it open: what one wrote the others read."""

    path: str
    users: int = 0
    there: bool = False                     # somebody has opened it: it needn't be looked for
    is_sized: bool = True                   # the filesystem knows how long it is
    written: bytearray | None = None        # its content, once somebody has written to it
    dirty: bool = False
    counted: int = 0                        # in the quota, and not handed over yet: comes back if it never is
    gone: bool = False                      # removed: what is written goes nowhere
    lock: threading.RLock = field(factory=threading.RLock)


class FsspecTree:
    """``path`` of an ``fsspec.AbstractFileSystem`` (``fs``) and what is below it.

    ``buffer`` is how many bytes may be written but not handed over yet, all files together; ``quota`` is what may be
    added.
    """

    def __init__(
        self, fs: Any, path: str = "", *, readonly: bool, buffer: int, quota: Quota | None = None
    ) -> None:
        self.readonly = readonly
        self.quota = Quota() if quota is None else quota
        self._fs = fs
        self._root = str(fs._strip_protocol(path)).rstrip("/")
        self._room = buffer
        self._nodes: dict[str, _Node] = {}
        self._empty = EmptyDirectories()
        self._moving: list[str] = []        # nothing at or below these is opened now
        self._lock = threading.Condition(threading.Lock())

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if self._root else path

    # --- looking ---

    def room(self) -> Room:
        return self.quota.room()

    def stat(self, path: str) -> Stat:
        node = self._nodes.get(path)
        if node is not None and node.written is not None:
            return Stat(is_directory=False, size=len(node.written))
        try:
            return _stat_of(self._fs.info(self._at(path)))
        except FileNotFoundError:
            if path in self._empty:
                return Stat(is_directory=True)
            raise

    def list(self, path: str) -> list[tuple[str, Stat]]:
        found = {name: Stat(is_directory=True) for name in self._empty.names_in(path)}
        here = self._at(path).strip("/")
        for entry in self._entries(path):
            whole = str(entry["name"]).strip("/")
            name = whole.rpartition("/")[2]
            if whole == here and not _stat_of(entry).is_directory:
                raise OSError(errno.ENOTDIR, "a file")      # what the volume was made of
            if whole != here and _is_name(name):
                found[name] = _stat_of(entry)
        return list(found.items())

    def _entries(self, path: str) -> Sequence[Any]:
        try:
            entries: Sequence[Any] = self._fs.ls(self._at(path) or self._fs.root_marker, detail=True)
        except FileNotFoundError:
            if (path or self.readonly) and path not in self._empty:
                raise
            return ()       # it is there as soon as something is in it
        return entries

    def _is_stored(self, path: str) -> bool:
        """Whether the filesystem has it. Its own ``exists`` takes any error for a no."""
        try:
            self._fs.info(self._at(path))
        except FileNotFoundError:
            return False
        return True

    # --- files ---

    def open(self, path: str, *, write: bool, create: bool, exclusive: bool, truncate: bool) -> File:
        while True:
            opened = _Opened(self, self._used(path))
            try:
                with opened.node.lock:
                    if opened.node.path == path and not opened.node.gone:       # it may have been renamed meanwhile
                        self._opened(opened, create=create, exclusive=exclusive, truncate=truncate)
                        return opened
            except BaseException:
                self._left(opened.node)
                raise
            self._left(opened.node)

    def _opened(self, opened: _Opened, *, create: bool, exclusive: bool, truncate: bool) -> None:
        node = opened.node
        there = node.there or self._is_there(node)
        if there and exclusive:
            raise OSError(errno.EEXIST, "it is there")
        if not there and not create:
            raise OSError(errno.ENOENT, "it is not there")
        if not there:
            self._made(node.path, lambda: self._fs.pipe_file(self._at(node.path), b""))
            self._empty.filled(parent(node.path))
        node.there = True
        if truncate and there:
            opened.truncate(0)

    def truncate(self, path: str, size: int) -> None:
        opened = _Opened(self, self._used(path))
        try:
            opened.truncate(size)
        finally:
            opened.close()

    def _is_there(self, node: _Node) -> bool:
        try:
            stat = _stat_of(self._fs.info(self._at(node.path)))
        except FileNotFoundError:
            stat = Stat(is_directory=node.path in self._empty)
            if not stat.is_directory:
                return False
        if stat.is_directory:
            raise OSError(errno.EISDIR, "a directory")
        node.is_sized = stat.is_sized
        return True

    def _used(self, path: str) -> _Node:
        with self._lock:
            self._lock.wait_for(lambda: not any(is_below(path, moving) for moving in self._moving))
            node = self._nodes.setdefault(path, _Node(path))
            node.users += 1
            return node

    def _left(self, node: _Node) -> None:
        with self._lock:
            node.users -= 1
            if not node.users:
                if self._nodes.get(node.path) is node:
                    del self._nodes[node.path]
                self._room += len(node.written or b"")
                node.written = None
                if not node.gone:       # its removal has counted all of it
                    self.quota.back(node.counted)

    def load(self, node: _Node, size: int | None = None) -> bytearray:
        """The content of a file, to be changed; ``size`` is how much of it will be left of it."""
        if node.written is None:
            whole = b"" if size == 0 else self._content(node, size)
            self.take(len(whole))
            if size is not None and self.quota.size is not None and not node.gone:
                node.counted = min(0, size - self.stat(node.path).size)
                self.quota.add(size=node.counted)
            node.written = bytearray(whole)
        return node.written

    def _content(self, node: _Node, size: int | None) -> bytes:
        if _stat_of(self._fs.info(self._at(node.path))).size > self._room:
            raise OSError(errno.EFBIG, "more than the buffer")
        return bytes(self._fs.cat_file(self._at(node.path), end=size))

    def take(self, size: int) -> None:
        """Room in memory for so much more."""
        with self._lock:
            if size > self._room:
                raise OSError(errno.ENOSPC, "more is written than the buffer takes")
            self._room -= size

    def hand_over(self, node: _Node) -> None:
        """Give the filesystem what was written."""
        with node.lock:
            if node.dirty and not node.gone and node.written is not None:
                self._fs.pipe_file(self._at(node.path), bytes(node.written))
                node.counted = 0
                self._changed(node.path)
            node.dirty = False

    def reader(self, node: _Node) -> IO[bytes]:
        opened: IO[bytes] = self._fs.open(self._at(node.path), "rb")
        return opened

    # --- names ---

    def mkdir(self, path: str) -> None:
        if self._is_at(path):
            raise OSError(errno.EEXIST, "it is there")

        def make() -> None:
            self._fs.mkdir(self._at(path), create_parents=False)
            self._changed(path)
            self._keep(path)

        self._made(path, make)

    def _is_at(self, path: str) -> bool:
        return path in self._empty or self._is_stored(path)

    def _made(self, path: str, make: Callable[[], object]) -> None:
        self.quota.add(files=1)
        try:
            make()
        except BaseException:
            self.quota.add(files=-1)
            raise
        self._changed(path)

    def remove(self, path: str) -> None:
        if self.stat(path).is_directory:
            raise OSError(errno.EISDIR, "a directory")
        node = self._used(path)
        try:
            with node.lock:             # its size stays what it is, and who else removes it comes after
                if node.gone:
                    raise OSError(errno.ENOENT, "it is not there")
                size = self.stat(path).size
                self._fs.rm_file(self._at(path))
                self._removed(path, size)       # before a new node can be made, which would be asked for a size again
        finally:
            self._left(node)
        self._emptied(parent(path))

    def _removed(self, path: str, size: int) -> None:
        self.quota.add(files=-1, size=-size)
        self._changed(path)
        self._forget(path)

    def rmdir(self, path: str) -> None:
        if not self.stat(path).is_directory:
            raise OSError(errno.ENOTDIR, "not a directory")
        if self.list(path):
            raise OSError(errno.ENOTEMPTY, "not empty")
        if self._is_stored(path):
            self._fs.rmdir(self._at(path))
        self._empty.discard(path)
        self.quota.add(files=-1)
        self._changed(path)
        self._emptied(parent(path))

    def rename(self, old: str, new: str) -> None:
        with self._still(old, new) as nodes:
            self._check_lengths(old, new, nodes)
            is_directory, is_stored = self.stat(old).is_directory, self._is_stored(old)
            over = self.stat(new) if self._is_at(new) else None
            if over is not None and over.is_directory != is_directory:
                raise OSError(errno.EISDIR if over.is_directory else errno.ENOTDIR, "of another kind")
            if over is not None and is_directory:
                self.rmdir(new)
            if is_stored:
                is_over = over is not None and not is_directory
                move(self._fs, self._at(old), self._at(new), is_directory=is_directory, is_over=is_over)
                self._empty.filled(parent(new))
            if over is not None and not is_directory:
                self._removed(new, over.size)
            self._renamed(old, new, nodes)
            self._emptied(parent(old))

    def _check_lengths(self, old: str, new: str, nodes: Sequence[_Node]) -> None:
        below = [node.path for node in nodes if is_below(node.path, old)] + self._empty.below(old)
        if any(is_too_long(new + path[len(old):]) for path in below):
            raise OSError(errno.ENAMETOOLONG, "too long a path below it")

    def _renamed(self, old: str, new: str, nodes: Sequence[_Node]) -> None:
        with self._lock:
            for node in nodes:
                if self._nodes.get(node.path) is node and is_below(node.path, old):
                    del self._nodes[node.path]
                    node.path = new + node.path[len(old):]
                    self._nodes[node.path] = node
        self._empty.moved(old, new)
        self._changed(old)
        self._changed(new)

    def _keep(self, path: str) -> None:
        """Have a directory that the filesystem may not have, and those above it. Raises OSError (ENOSPC)."""
        missing = []
        while path and not self._is_surely_at(path):
            missing.append(path)
            path = parent(path)
        self._empty.add(missing)

    def _is_surely_at(self, path: str) -> bool:
        try:
            return self._is_at(path)
        except Exception:       # what has been done isn't undone by this; one that is kept for nothing does no harm
            return False

    def _emptied(self, path: str) -> None:
        """Keep a directory that may have gone with what was in it, if there is room for it."""
        with suppress(OSError):
            self._keep(path)

    @contextmanager
    def _still(self, *tops: str) -> Iterator[Sequence[_Node]]:
        """Nobody reads, writes or opens anything at or below these; yields what is open there.

        To move is to copy and to remove, mostly: what was handed over between the two would be lost.
        """
        with self._lock:
            self._lock.wait_for(lambda: not any(
                is_below(top, moving) or is_below(moving, top) for moving in self._moving for top in tops))
            self._moving += tops
            nodes = [node for path, node in self._nodes.items() if any(is_below(path, top) for top in tops)]
        try:
            with ExitStack() as stack:
                for node in nodes:          # who has one of these locks waits for no other one
                    stack.enter_context(node.lock)
                yield nodes
        finally:
            with self._lock:
                for top in tops:
                    self._moving.remove(top)
                self._lock.notify_all()

    def _forget(self, path: str) -> None:
        with self._lock:
            if (node := self._nodes.pop(path, None)) is not None:
                node.gone = True

    def _changed(self, path: str) -> None:
        # What it remembers of the directory is old.
        self._fs.invalidate_cache(self._at(parent(path)))


class _Opened:
    """One opening of a file."""

    def __init__(self, tree: FsspecTree, node: _Node) -> None:
        self.node = node
        self._tree = tree
        self._reader: IO[bytes] | None = None
        self._at = 0            # of the reader, which may be a stream that can't tell

    @property
    def is_sized(self) -> bool:
        return self.node.is_sized or self.node.written is not None

    def read(self, offset: int, count: int) -> bytes:
        with self.node.lock:
            if self.node.written is not None:
                return bytes(self.node.written[offset:offset + count])
            if self._reader is None:
                self._reader, self._at = self._tree.reader(self.node), 0
            if self._at != offset:
                self._reader.seek(offset)
            self._at = -1       # should it fail
            out = bytearray()
            while len(out) < count and (data := self._reader.read(count - len(out))):
                out += data
            self._at = offset + len(out)
            return bytes(out)

    def write(self, offset: int, data: bytes) -> None:
        with self.node.lock:
            whole = self._tree.load(self.node)
            self._grow(whole, offset + len(data))
            whole[offset:offset + len(data)] = data
            self.node.dirty = True

    def truncate(self, size: int) -> None:
        with self.node.lock:
            whole = self._tree.load(self.node, size)
            self._grow(whole, size)
            if len(whole) > size:
                self._tree.take(size - len(whole))
                self._count(size - len(whole))
                del whole[size:]
            self.node.dirty = True

    def _grow(self, whole: bytearray, size: int) -> None:
        if (more := size - len(whole)) > 0:
            self._tree.take(more)
            try:
                self._count(more)
            except OSError:
                self._tree.take(-more)
                raise
            whole.extend(bytes(more))

    def _count(self, size: int) -> None:
        if not self.node.gone:      # what is removed is counted no more
            self._tree.quota.add(size=size)
            self.node.counted += size

    def size(self) -> int:
        with self.node.lock:
            if self.node.written is not None:
                return len(self.node.written)
            return 0 if self.node.gone else self._tree.stat(self.node.path).size

    def flush(self) -> None:
        self._tree.hand_over(self.node)

    def close(self) -> None:
        try:
            if self._reader is not None:
                self._reader.close()
            self._tree.hand_over(self.node)
        finally:
            self._tree._left(self.node)


def _is_name(name: str) -> bool:
    raw = name.encode(errors="replace")
    return bool(name) and name not in (".", "..") and "\0" not in name and len(raw) <= MAX_NAME and _is_text(name)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stat_of(info: Any) -> Stat:
    """What fsspec says of a file, of which only name, size and type are certain."""
    size, is_directory = info.get("size"), info.get("type") == "directory"
    is_sized = isinstance(size, int | float) and 0 <= size < math.inf
    when = next((info[key] for key in ("mtime", "modified", "LastModified", "created") if info.get(key)), 0.0)
    return Stat(
        is_directory=is_directory,
        size=int(size) if is_sized else 0,
        mtime=_seconds(when),
        is_sized=is_sized or is_directory,
    )


def _seconds(when: object) -> float:
    """Since 1970; 0 for what is no time."""
    try:
        when = when.timestamp() if isinstance(when, datetime) else when
        seconds = float(when) if isinstance(when, int | float) else 0.0
    except (ValueError, OverflowError, OSError):        # the year 1 of a zone, a number that no float has
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0
