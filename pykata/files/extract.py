"""Unpacks a tar from a guest into a directory of the host, in a thread. The tar is hostile.

Nothing is ever opened by a path: each step goes from the descriptor of a directory to a name in it, and no symlink is
followed, whoever made it. What replaces something is made anew (``O_EXCL``), and a hard link is only made to a file
that came out of the same tar. So a name can only stand for what is below the target, whatever else the tar has.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from attrs import define, field, frozen

from pykata.errors import UnsafeTreeError
from pykata.files.checks import number
from pykata.files.pack import SKIPPED
from pykata.files.paths import shown, text
from pykata.files.values import Transfer
from pykata.images.entry import BadEntryError, Entry, Kind
from pykata.images.stream import Reader, StreamError
from pykata.images.tar_reader import TarReader

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_NAMES = 256 * 1024 * 1024   # bytes of the directories' names, which are kept up to the end
MAX_FILL = 20 * 1024            # zeros after the end of an archive
MAX_TIME = 2**62                # nanoseconds, about; what is beyond isn't a time that filesystems keep


@frozen(kw_only=True)
class Bounds:
    """How much a guest may write to the host: bytes (with the holes of sparse files), and files, directories, links."""

    size: int
    entries: int
    setuid: bool = False

    def __attrs_post_init__(self) -> None:
        number("max_size", self.size)
        number("max_entries", self.entries)

    def check(self, entries: int, size: int) -> None:
        """Raises UnsafeTreeError for more than that."""
        if entries > self.entries:
            raise UnsafeTreeError(f"it has more than {self.entries} entries", hint="raise max_entries=")
        if size > self.size:
            raise UnsafeTreeError(f"it has more than {self.size} bytes", hint="raise max_size=")


class _Attributes(NamedTuple):
    path: bytes
    mode: int
    time: int


@define
class Extractor:
    """Unpacks into one directory, ``top``, a descriptor that somebody else closes."""

    top: int
    bounds: Bounds
    only: bytes | None = None
    """The name that the one file of the tar gets, which else may have any number of entries."""
    made: bool = False
    """The directory is new, and gets the attributes that the tar has for its top."""
    _reader: Reader = field(init=False)
    _parent: bytes = b""
    _here: int = -1
    _directories: list[_Attributes] = field(factory=list)
    _inodes: set[tuple[int, int]] = field(factory=set)
    _entries: int = 0
    _size: int = 0
    _names: int = 0
    _skipped: list[str] = field(factory=list)

    def extract(self, reader: Reader) -> Transfer:
        """Unpack all of it. Raises UnsafeTreeError, and OSError for what the host can't do."""
        self._reader = reader
        tar = TarReader(reader)
        try:
            for entry in tar:
                self._count(entry)
                self._add(entry, tar)
            expect_end(reader)
        except BadEntryError as exc:
            raise UnsafeTreeError(f"the guest sent a bad archive: {exc.why}", path=text(exc.path)) from exc
        except StreamError as exc:
            raise UnsafeTreeError(f"the guest sent a bad archive: {exc}") from exc
        finally:
            self._leave()
        self._finish()
        return Transfer(self._entries, self._size, tuple(self._skipped))

    def _count(self, entry: Entry) -> None:
        self._entries += 1
        self._size += entry.size
        self.bounds.check(self._entries, self._size)

    def _add(self, entry: Entry, tar: TarReader) -> None:
        if self.only is not None:
            if entry.kind is not Kind.FILE or self._entries > 1:
                raise UnsafeTreeError("the guest sent something else than the file that was asked for")
            self._file(self.top, self.only, entry, tar)
            return
        if not entry.path:
            self._root(entry)
            return
        parent, _, name = entry.path.rpartition(b"/")
        directory = self._enter(parent, entry)
        try:
            self._make(directory, name, entry, tar)
        except (FileExistsError, IsADirectoryError) as exc:
            raise _unsafe(entry, "is already something else on the host", "download into an empty directory") from exc

    def _make(self, directory: int, name: bytes, entry: Entry, tar: TarReader) -> None:
        match entry.kind:
            case Kind.DIRECTORY:
                self._directory(directory, name, entry)
            case Kind.FILE:
                _unlink(directory, name)
                self._file(directory, name, entry, tar)
            case Kind.SYMLINK:
                _unlink(directory, name)
                os.symlink(entry.link, name, dir_fd=directory)
                os.utime(name, ns=(_time(entry),) * 2, dir_fd=directory, follow_symlinks=False)
            case Kind.HARDLINK:
                self._hardlink(directory, name, entry)
            case _:
                if len(self._skipped) < SKIPPED:
                    self._skipped.append(text(entry.path))

    def _root(self, entry: Entry) -> None:
        if entry.kind is not Kind.DIRECTORY:
            raise UnsafeTreeError("the guest sent something else than a directory in place of its top")
        if self.made:
            self._directories.append(_Attributes(b"", self._mode(entry), _time(entry)))

    def _directory(self, parent: int, name: bytes, entry: Entry) -> None:
        self._names += len(entry.path)
        if self._names > MAX_NAMES:
            raise UnsafeTreeError(f"the names of its directories have more than {MAX_NAMES} bytes")
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                raise
        self._directories.append(_Attributes(entry.path, self._mode(entry), _time(entry)))

    def _file(self, directory: int, name: bytes, entry: Entry, tar: TarReader) -> None:
        descriptor = os.open(name, NEW, 0o600, dir_fd=directory)
        try:
            if entry.extents is None:
                self._reader.copy(tar.leave_data(), descriptor)
            else:
                _write_parts(descriptor, tar.data(), entry.extents)
                os.truncate(descriptor, entry.size)
            os.fchmod(descriptor, self._mode(entry))
            os.utime(descriptor, ns=(_time(entry),) * 2)
            found = os.fstat(descriptor)
            self._inodes.add((found.st_dev, found.st_ino))
        finally:
            os.close(descriptor)

    def _hardlink(self, directory: int, name: bytes, entry: Entry) -> None:
        parent, _, first = entry.link.rpartition(b"/")
        source = self._walk(parent, entry)
        try:
            try:
                found = os.stat(first, dir_fd=source, follow_symlinks=False)
            except FileNotFoundError:
                raise _unsafe(entry, "is a hard link to what isn't there") from None
            if (found.st_dev, found.st_ino) not in self._inodes or not stat.S_ISREG(found.st_mode):
                raise _unsafe(entry, "is a hard link to what didn't come from the container")
            if entry.link == entry.path:
                return
            _unlink(directory, name)
            os.link(first, name, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
            made = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if (made.st_dev, made.st_ino) != (found.st_dev, found.st_ino):
                os.unlink(name, dir_fd=directory)
                raise _unsafe(entry, "is a hard link to what was exchanged meanwhile")
        finally:
            os.close(source)

    def _enter(self, path: bytes, entry: Entry) -> int:
        """The directory at ``path``, kept for the next entry, which is likely to be in it, too."""
        if not path:
            return self.top
        if self._here < 0 or self._parent != path:
            self._leave()
            self._here, self._parent = self._walk(path, entry), path
        return self._here

    def _leave(self) -> None:
        if self._here >= 0:
            os.close(self._here)
        self._here = -1

    def _walk(self, path: bytes, entry: Entry) -> int:
        """A new descriptor of a directory, opened step by step from the top; what is missing is made."""
        here = os.dup(self.top)
        for part in path.split(b"/") if path else ():
            try:
                try:
                    below = os.open(part, DIRECTORY, dir_fd=here)
                except FileNotFoundError:
                    os.mkdir(part, 0o755, dir_fd=here)
                    below = os.open(part, DIRECTORY, dir_fd=here)
            except OSError as exc:
                if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise _unsafe(entry, f"leads through {shown(part)}, which is no directory") from exc
                raise
            finally:
                os.close(here)
            here = below
        return here

    def _finish(self) -> None:
        """Permissions and times of directories, once nothing more is put into them."""
        for path, mode, time in reversed(self._directories):
            directory = self._walk(path, Entry(path, Kind.DIRECTORY))
            try:
                os.fchmod(directory, mode)
                os.utime(directory, ns=(time, time))
            finally:
                os.close(directory)

    def _mode(self, entry: Entry) -> int:
        return entry.mode & (0o7777 if self.bounds.setuid else 0o1777)


def expect_end(reader: Reader) -> None:
    """Read what is behind the end of an archive, which is only zeros. Raises UnsafeTreeError."""
    for _ in range(MAX_FILL):       # what some writers fill their last record with
        if reader.at_end():
            return
        if reader.read(1) != b"\0":
            break
    raise UnsafeTreeError("the guest sent more after the end of its archive")


def _write_parts(descriptor: int, pieces: Iterable[memoryview], extents: tuple[tuple[int, int], ...]) -> None:
    parts = iter(extents)
    offset, left = 0, 0
    for piece in pieces:
        view = piece
        while view:
            while not left:
                offset, left = next(parts)
            done = os.pwrite(descriptor, view[:left], offset)
            view, offset, left = view[done:], offset + done, left - done


def _unlink(directory: int, name: bytes) -> None:
    """Make room for something new. A directory stays: what is in it isn't the tar's."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _time(entry: Entry) -> int:
    time = entry.mtime * 10**9 + entry.nanoseconds
    return time if abs(time) < MAX_TIME else 0


def _unsafe(entry: Entry, why: str, hint: str = "") -> UnsafeTreeError:
    return UnsafeTreeError(f"{shown(entry.path)} {why}", path=text(entry.path), hint=hint)
