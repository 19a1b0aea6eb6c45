"""The files of a container of the fake agent: a tree in memory, served as files.proto says."""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import NoReturn

from attrs import define, field

from pykata.files import v1
from pykata.testing.process import FakeProcess

PERMISSIONS = 0o7777
UMASK = 0o022
INLINE = 1024 * 1024        # bytes of content in one answer: files.proto
MAX_LINKS = 40
HEAD = 4

_inodes = count(1)


class _Failed(Exception):
    def __init__(self, number: int, step: str) -> None:
        super().__init__(number, step)
        self.failure = v1.Failure(errno=number, step=step)


@define(eq=False)
class FakeFile:
    """A file in memory: a directory has ``children``, a symlink a ``target``, all else ``data``."""

    mode: int
    data: bytes = b""
    target: bytes = b""
    children: dict[bytes, FakeFile] = field(factory=dict)
    uid: int = 0
    gid: int = 0
    mtime_ns: int = field(factory=time.time_ns)
    inode: int = field(factory=lambda: next(_inodes))

    @property
    def is_dir(self) -> bool:
        """It is a directory."""
        return stat.S_ISDIR(self.mode)

    def attributes(self, name: bytes = b"") -> v1.Attributes:
        """What ``stat`` says of it."""
        return v1.Attributes(
            mode=self.mode, uid=self.uid, gid=self.gid, size=len(self.data or self.target), mtime_ns=self.mtime_ns,
            inode=self.inode, links=1, name=name, target=self.target,
        )  # fmt: skip


def _directory(mode: int = 0o755) -> FakeFile:
    return FakeFile(stat.S_IFDIR | mode)


@define(eq=False)
class FakeFiles:
    """The tree of a container, empty at first but for ``/tmp``. ``root`` can be looked into, or be filled beforehand.

    Trees (``upload``, ``download``), ``watch`` and ``changes`` are refused with ``ENOSYS``, and nobody lacks a right.
    """

    root: FakeFile = field(factory=lambda: FakeFile(stat.S_IFDIR | 0o755, children={b"tmp": _directory(0o1777)}))

    async def serve(self, process: FakeProcess) -> int:
        """The program that answers requests; one for each process that a container's ``files`` starts."""
        stream = _Frames(process)
        while (frame := await stream.next()) is not None:
            request = v1.Request.parse(frame)
            try:
                if request.write is not None and request.write.bulk:
                    await self._receive(request.write, process, stream)
                    continue
                if request.read is not None and request.read.bulk:
                    await self._send(request.read, process)
                    return 0
                answer = self._perform(request)
            except _Failed as failed:
                answer = v1.Response(failure=failed.failure)
            await _answer(process, answer)
        return 0

    async def _receive(self, write: v1.Write, process: FakeProcess, stream: _Frames) -> None:
        self._check_target(write)
        await _answer(process, v1.Response(attributes=v1.Attributes(mode=stat.S_IFREG)))
        while data := await stream.next():
            write.data += data
        if data is not None:        # complete, not cut off
            self._write(write)
            await _answer(process, v1.Response(done=v1.Done()))

    async def _send(self, read: v1.Read, process: FakeProcess) -> None:
        found = self._file(read.path)
        await _answer(process, v1.Response(attributes=found.attributes()))
        await process.write(_part(found.data, read))

    def _perform(self, request: v1.Request) -> v1.Response:  # noqa: RET503  _fail doesn't return
        if request.stat is not None:
            return v1.Response(attributes=self._found(request.stat.path, request.stat.follow).attributes())
        if request.list is not None:
            listed = self._found(request.list.path, True)
            if not listed.is_dir:
                _fail(errno.ENOTDIR, "list")
            entries = [child.attributes(name) for name, child in listed.children.items()]
            return v1.Response(entries=v1.Entries(entries=entries, last=True))
        if request.read is not None:
            data = _part(self._file(request.read.path).data, request.read)
            large = len(data) > INLINE
            return v1.Response(content=v1.Content(data=b"" if large else data, large=large))
        for message, change in self._changes(request):
            if message is not None:
                change()
                return v1.Response(done=v1.Done())
        _fail(errno.ENOSYS, "request")

    def _changes(self, request: v1.Request) -> Iterator[tuple[object, Callable[[], None]]]:
        yield request.write, lambda: self._write(request.write or v1.Write())
        yield request.make_directory, lambda: self._make_directory(request.make_directory or v1.MakeDirectory())
        yield request.remove, lambda: self._remove(request.remove or v1.Remove())
        yield request.rename, lambda: self._rename(request.rename or v1.Rename())
        yield request.set_attributes, lambda: self._set(request.set_attributes or v1.SetAttributes())
        yield request.make_symlink, lambda: self._link(request.make_symlink or v1.MakeSymlink())

    def _walk(self, path: bytes, follow: bool = True) -> tuple[FakeFile, bytes]:
        """The directory above, and the name in it; of the root ``.``."""
        if not path:
            _fail(errno.ENOENT, "open")
        stack, parts, links = [self.root], _parts(path), 0
        while parts:
            part = parts.pop()
            here = stack[-1]
            if not here.is_dir:
                _fail(errno.ENOTDIR, "open")
            if part == b"..":
                stack = stack[:-1] or stack
                continue
            child = here.children.get(part)
            if child is not None and child.target and (parts or follow):
                links += 1
                if links > MAX_LINKS:
                    _fail(errno.ELOOP, "open")
                stack = [self.root] if child.target.startswith(b"/") else stack
                parts += _parts(child.target)
            elif not parts:
                return here, part
            elif child is None:
                _fail(errno.ENOENT, "open")
            else:
                stack.append(child)
        # It ends in the root, or in "..".
        return _directory() if stack[-1] is not self.root else self.root, b"."

    def _lookup(self, path: bytes, follow: bool = True) -> FakeFile | None:
        above, name = self._walk(path, follow)
        return self.root if name == b"." else above.children.get(name)

    def _found(self, path: bytes, follow: bool) -> FakeFile:
        found = self._lookup(path, follow)
        if found is None:
            _fail(errno.ENOENT, "open")
        return found

    def _file(self, path: bytes) -> FakeFile:
        found = self._found(path, True)
        if found.is_dir:
            _fail(errno.EISDIR, "read")
        return found

    def _check_target(self, write: v1.Write) -> FakeFile | None:
        if write.parents:
            self._make_all(write.path.rstrip(b"/").rpartition(b"/")[0])
        existing = self._lookup(write.path)
        if existing is not None and existing.is_dir:
            _fail(errno.EISDIR, "write")
        if existing is not None and write.how == v1.WriteHow.CREATE:
            _fail(errno.EEXIST, "create")
        if existing is None and write.how == v1.WriteHow.AT:
            _fail(errno.ENOENT, "open")
        return existing

    def _write(self, write: v1.Write) -> None:
        file = self._check_target(write)
        if file is None:
            file = self._made(write.path, FakeFile(stat.S_IFREG | 0o666 & ~UMASK))
        kept = {v1.WriteHow.APPEND: file.data, v1.WriteHow.AT: file.data[: write.offset].ljust(write.offset, b"\0")}
        rest = file.data[write.offset + len(write.data) :] if write.how == v1.WriteHow.AT else b""
        file.data = kept.get(write.how, b"") + write.data + rest
        file.mtime_ns = time.time_ns()
        if write.set_mode:
            file.mode = stat.S_IFREG | write.mode & PERMISSIONS

    def _made(self, path: bytes, file: FakeFile, follow: bool = True) -> FakeFile:
        above, name = self._walk(path, follow)
        if name == b"." or name in above.children:
            _fail(errno.EEXIST, "create")
        above.children[name] = file
        return file

    def _make_all(self, path: bytes) -> None:
        if path and self._lookup_or_none(path) is None:
            self._make_all(path.rpartition(b"/")[0])
            self._made(path, _directory())

    def _lookup_or_none(self, path: bytes) -> FakeFile | None:
        try:
            return self._lookup(path)
        except _Failed as failed:
            if failed.failure.errno == errno.ENOENT:
                return None
            raise

    def _make_directory(self, request: v1.MakeDirectory) -> None:
        existing = self._lookup_or_none(request.path)
        if existing is not None and existing.is_dir and request.exist_ok:
            return
        if request.parents:
            self._make_all(request.path.rstrip(b"/").rpartition(b"/")[0])
        self._made(request.path, _directory(request.mode & ~UMASK & PERMISSIONS), follow=False)

    def _remove(self, request: v1.Remove) -> None:
        above, name = self._walk(request.path, follow=False)
        found = above.children.get(name)
        if found is None and request.missing_ok:
            return
        if found is None:
            _fail(errno.EBUSY if name == b"." else errno.ENOENT, "remove")
        if found.children and not request.tree:
            _fail(errno.ENOTEMPTY, "remove")
        del above.children[name]

    def _rename(self, request: v1.Rename) -> None:
        above, name = self._walk(request.path, follow=False)
        below, other = self._walk(request.target, follow=False)
        if name not in above.children:
            _fail(errno.ENOENT, "rename")
        if other in below.children and not request.replace:
            _fail(errno.EEXIST, "rename")
        below.children[other] = above.children.pop(name)

    def _set(self, request: v1.SetAttributes) -> None:
        file = self._lookup(request.path, request.follow)
        if file is None and request.create:
            file = self._made(request.path, FakeFile(stat.S_IFREG | (request.mode or 0) & ~UMASK & PERMISSIONS))
        elif request.create and request.exclusive:
            _fail(errno.EEXIST, "create")
        if file is None:
            _fail(errno.ENOENT, "open")
        if request.size is not None:
            file.data = file.data[: request.size].ljust(request.size, b"\0")
        if request.mode is not None and not request.create:
            file.mode = stat.S_IFMT(file.mode) | request.mode & PERMISSIONS
        file.uid = file.uid if request.uid is None else request.uid
        file.gid = file.gid if request.gid is None else request.gid
        if request.mtime_ns is not None or request.now:
            file.mtime_ns = time.time_ns() if request.mtime_ns is None else request.mtime_ns

    def _link(self, request: v1.MakeSymlink) -> None:
        file = FakeFile(stat.S_IFLNK | 0o777, target=request.target)
        self._made(request.path, self._file(request.target) if request.hard else file, follow=False)


class _Frames:
    """Frames of a process's standard input."""

    def __init__(self, process: FakeProcess) -> None:
        self._process = process
        self._buffer = b""

    async def next(self) -> bytes | None:
        """The next one; None at the end."""
        while len(self._buffer) < HEAD or len(self._buffer) < HEAD + int.from_bytes(self._buffer[:HEAD]):
            if not (piece := await self._process.read()):
                return None
            self._buffer += piece
        end = HEAD + int.from_bytes(self._buffer[:HEAD])
        frame, self._buffer = self._buffer[HEAD:end], self._buffer[end:]
        return frame


async def _answer(process: FakeProcess, response: v1.Response) -> None:
    data = bytes(response)
    await process.write(len(data).to_bytes(HEAD) + data)


def _part(data: bytes, read: v1.Read) -> bytes:
    return data[read.offset : read.offset + read.size] if read.size else data[read.offset :]


def _parts(path: bytes) -> list[bytes]:
    """The parts of a path, the last one first."""
    return [part for part in path.split(b"/") if part not in (b"", b".")][::-1]


def _fail(number: int, step: str) -> NoReturn:
    raise _Failed(number, step)
