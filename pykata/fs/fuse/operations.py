"""Each request as what it does to a tree. All of it runs in threads."""

from __future__ import annotations

import errno
import os
import stat as modes
import struct
from collections.abc import Callable

from pykata.fs.fuse.nodes import ROOT, Handle, Handles, Nodes, is_too_long
from pykata.fs.fuse.tree import File, Stat, Tree
from pykata.fs.fuse.wire import DATA, MAJOR, MAX_NAME, MINOR, MalformedError, Op, Request, fields, names

BLOCK = 4096
UNLIMITED = 1 << 28     # blocks or files: nobody knows
MOST = 1 << 62          # of a size, whatever a filesystem says
# fuse.h, FUSE_INIT's flags.
ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, AUTO_INVAL_DATA = 1 << 0, 1 << 3, 1 << 5, 1 << 12
PARALLEL_DIROPS, MAX_PAGES = 1 << 18, 1 << 22
WANTED = ASYNC_READ | ATOMIC_O_TRUNC | BIG_WRITES | AUTO_INVAL_DATA | PARALLEL_DIROPS | MAX_PAGES
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_HANDLE = 1, 2, 4, 8, 64
GETATTR_HANDLE, NOREPLACE = 1, 1
FOPEN_DIRECT_IO = 1     # the guest's kernel asks for what a program reads, whatever size the file has
DT_DIR, DT_REG = 4, 8

_INIT = struct.Struct("<IIIIHHIIHHI28x")
_DIRENT = struct.Struct("<QQII")
_STATFS = struct.Struct("<QQQQQIII28x")


class Session:
    """The requests of one conversation. ``keep`` is in seconds."""

    def __init__(self, tree: Tree, keep: float) -> None:
        self._tree = tree
        self._keep = struct.pack("<Q", int(keep)), struct.pack("<I", int(keep % 1 * 1e9))
        self._nodes = Nodes()
        self._handles = Handles()
        self._does: dict[int, Callable[[Request], bytes]] = {
            Op.INIT: self._init, Op.LOOKUP: self._lookup, Op.FORGET: self._forget, Op.BATCH_FORGET: self._forget_all,
            Op.GETATTR: self._getattr, Op.SETATTR: self._setattr, Op.OPEN: self._open, Op.CREATE: self._create,
            Op.MKNOD: self._mknod, Op.READ: self._read, Op.WRITE: self._write, Op.FLUSH: self._flush,
            Op.FSYNC: self._flush, Op.RELEASE: self._release, Op.OPENDIR: self._opendir, Op.READDIR: self._readdir,
            Op.RELEASEDIR: self._release, Op.MKDIR: self._mkdir, Op.UNLINK: self._unlink, Op.RMDIR: self._rmdir,
            Op.RENAME: self._rename, Op.RENAME2: self._rename2, Op.STATFS: self._statfs, Op.SYMLINK: self._never,
            Op.LINK: self._never, Op.FALLOCATE: self._unsupported, Op.DESTROY: lambda request: b"",
            Op.INTERRUPT: lambda request: b"",
        }  # fmt: skip

    def do(self, request: Request) -> bytes:
        """The body of the answer. Raises OSError for the guest, MalformedError, and whatever the tree raises."""
        does = self._does.get(request.op)
        if does is None:
            raise OSError(errno.ENOSYS, "not supported")        # it won't be asked again
        return does(request)

    def close(self) -> list[Exception]:
        """The conversation is over: hand over what was written. Returns what went wrong."""
        failures = []
        for handle in self._handles.drop_all():
            try:
                if handle.file is not None:
                    handle.file.close()
            except Exception as error:  # the tree is somebody else's
                failures.append(error)
        return failures

    def _init(self, request: Request) -> bytes:
        major, _, readahead, flags = fields("IIII", request.body)
        if major != MAJOR:
            raise MalformedError(f"version {major} of the protocol")
        return _INIT.pack(MAJOR, MINOR, readahead, flags & WANTED, 16, 12, DATA, 1, DATA // BLOCK, 0, 0)

    # --- nodes ---

    def _lookup(self, request: Request) -> bytes:
        path = self._below(request.node, *names(request.body, 0, 1))
        return self._entry(path, self._tree.stat(path))

    def _forget(self, request: Request) -> bytes:
        self._nodes.forget(request.node, *fields("Q", request.body))
        return b""

    def _forget_all(self, request: Request) -> bytes:
        (number,) = fields("I", request.body)
        for at in range(8, min(8 + 16 * number, len(request.body) - 15), 16):
            self._nodes.forget(*fields("QQ", request.body[at:at + 16]))
        return b""

    def _entry(self, path: str, found: Stat) -> bytes:
        number = self._nodes.told(path)
        seconds, fraction = self._keep
        return struct.pack("<QQ", number, 0) + seconds * 2 + fraction * 2 + self._attributes(number, found)

    def _attributes(self, number: int, found: Stat) -> bytes:
        write = 0 if self._tree.readonly else 0o222
        mode = (modes.S_IFDIR if found.is_directory else modes.S_IFREG) | 0o555 | write
        when, fraction = divmod(min(max(found.mtime, 0.0), 2.0**62), 1)
        size = min(found.size, MOST)
        nanoseconds = int(fraction * 1e9)
        return struct.pack("<QQQQQQ", number, size, -(-size // 512), *(int(when),) * 3) + struct.pack(
            "<IIIIIIIIII", *(nanoseconds,) * 3, mode, 2 if found.is_directory else 1, 0, 0, 0, BLOCK, 0)

    def _stat(self, number: int) -> Stat:
        return Stat(is_directory=True) if number == ROOT else self._tree.stat(self._nodes.path(number))

    def _told_attributes(self, number: int, found: Stat) -> bytes:
        seconds, fraction = self._keep
        return seconds + fraction + bytes(4) + self._attributes(number, found)

    def _getattr(self, request: Request) -> bytes:
        flags, _, number = fields("IIQ", request.body)
        found = self._stat_open(request.node, number if flags & GETATTR_HANDLE else 0)
        return self._told_attributes(request.node, found)

    def _stat_open(self, node: int, number: int) -> Stat:
        """Of a file that is open by this number, if it is: it may have been removed."""
        try:
            return self._stat(node)
        except OSError:
            if not number:
                raise
            handle, file = self._handles.file(number)
            with handle.lock:
                return Stat(is_directory=False, size=file.size())

    def _setattr(self, request: Request) -> bytes:
        valid, _, handle, size = fields("IIQQ", request.body)
        self._writable()
        if valid & (SET_MODE | SET_UID | SET_GID):
            raise OSError(errno.EPERM, "files have no owner and no mode of their own")
        if valid & SET_SIZE and valid & SET_HANDLE:
            opened, file = self._handles.file(handle)
            with opened.lock:
                file.truncate(size)
        elif valid & SET_SIZE:
            self._tree.truncate(self._nodes.path(request.node), size)
        found = self._stat_open(request.node, handle if valid & SET_HANDLE else 0)
        return self._told_attributes(request.node, found)       # times are the file system's own

    def _statfs(self, request: Request) -> bytes:
        room = self._tree.room()
        blocks, blocks_left = _counted(room.size, room.size_left, BLOCK)
        files, files_left = _counted(room.files, room.files_left, 1)
        return _STATFS.pack(blocks, blocks_left, blocks_left, files, files_left, BLOCK, MAX_NAME, BLOCK)

    # --- files ---

    def _open(self, request: Request) -> bytes:
        (flags,) = fields("I", request.body)
        return self._opened(self._opening(self._nodes.path(request.node), flags & ~(os.O_CREAT | os.O_EXCL)))

    def _create(self, request: Request) -> bytes:
        (flags,) = fields("I", request.body)
        path = self._below(request.node, *names(request.body, 16, 1))
        self._writable()
        file = self._opening(path, flags | os.O_CREAT)
        try:
            return self._entry(path, self._tree.stat(path)) + self._opened(file)
        except BaseException:
            file.close()
            raise

    def _opening(self, path: str, flags: int) -> File:
        write = flags & os.O_ACCMODE != os.O_RDONLY
        if write or flags & os.O_TRUNC:
            self._writable()
        return self._tree.open(path, write=write, create=bool(flags & os.O_CREAT), exclusive=bool(flags & os.O_EXCL),
                               truncate=bool(flags & os.O_TRUNC))

    def _opened(self, file: File) -> bytes:
        try:
            flags = 0 if file.is_sized else FOPEN_DIRECT_IO
            return struct.pack("<QII", self._handles.add(Handle(file)), flags, 0)
        except OSError:
            file.close()
            raise

    def _mknod(self, request: Request) -> bytes:
        (mode,) = fields("I", request.body)
        path = self._below(request.node, *names(request.body, 16, 1))
        self._writable()
        if not modes.S_ISREG(mode):
            raise OSError(errno.EPERM, "only files and directories")
        self._tree.open(path, write=True, create=True, exclusive=True, truncate=False).close()
        return self._entry(path, self._tree.stat(path))

    def _read(self, request: Request) -> bytes:
        number, offset, size = fields("QQI", request.body)
        handle, file = self._handles.file(number)
        most = min(size, DATA)
        with handle.lock:
            return file.read(offset, most)[:most]      # whatever it gave

    def _write(self, request: Request) -> bytes:
        number, offset, size = fields("QQI", request.body)
        data = request.body[40:]
        if len(data) != size:
            raise MalformedError(f"a write of {size} bytes with {len(data)}")
        self._writable()
        handle, file = self._handles.file(number)
        with handle.lock:
            file.write(offset, data)
        return struct.pack("<II", size, 0)

    def _flush(self, request: Request) -> bytes:
        handle, file = self._handles.file(*fields("Q", request.body))
        with handle.lock:
            file.flush()
        return b""

    def _release(self, request: Request) -> bytes:
        handle = self._handles.drop(*fields("Q", request.body))
        if handle is not None and handle.file is not None:
            with handle.lock:
                handle.file.close()
        return b""

    # --- directories ---

    def _opendir(self, request: Request) -> bytes:
        path = "" if request.node == ROOT else self._nodes.path(request.node)
        return struct.pack("<QII", self._handles.add(Handle(listing=self._tree.list(path))), 0, 0)

    def _readdir(self, request: Request) -> bytes:
        number, offset, size = fields("QQI", request.body)
        listing = self._handles.get(number).listing
        if listing is None:
            raise OSError(errno.EBADF, "not an open directory")
        room, out = min(size, DATA), bytearray()
        for at, (name, found) in enumerate(listing[offset:offset + 5000], offset + 1):
            raw = name.encode()
            entry = _DIRENT.pack(at + 1, at, len(raw), DT_DIR if found.is_directory else DT_REG) + raw
            entry += bytes(-len(entry) % 8)
            if len(out) + len(entry) > room:
                break
            out += entry
        return bytes(out)

    def _mkdir(self, request: Request) -> bytes:
        path = self._below(request.node, *names(request.body, 8, 1))
        self._writable()
        self._tree.mkdir(path)
        return self._entry(path, Stat(is_directory=True))

    def _unlink(self, request: Request) -> bytes:
        return self._removed(self._tree.remove, request)

    def _rmdir(self, request: Request) -> bytes:
        return self._removed(self._tree.rmdir, request)

    def _removed(self, remove: Callable[[str], None], request: Request) -> bytes:
        path = self._below(request.node, *names(request.body, 0, 1))
        self._writable()
        remove(path)
        self._nodes.removed(path)
        return b""

    def _rename(self, request: Request) -> bytes:
        (directory,) = fields("Q", request.body)
        return self._moved(request.node, directory, names(request.body, 8, 2), 0)

    def _rename2(self, request: Request) -> bytes:
        directory, flags = fields("QI", request.body)
        return self._moved(request.node, directory, names(request.body, 16, 2), flags)

    def _moved(self, from_node: int, to_node: int, raw: list[bytes], flags: int) -> bytes:
        old, new = self._below(from_node, raw[0]), self._below(to_node, raw[1])
        self._writable()
        if flags & ~NOREPLACE or new.startswith(f"{old}/"):
            raise OSError(errno.EINVAL, "not that way")
        if flags & NOREPLACE and self._is_there(new):
            raise OSError(errno.EEXIST, "it is there")
        if old != new:
            self._tree.rename(old, new)
            self._nodes.moved(old, new)
        return b""

    def _is_there(self, path: str) -> bool:
        try:
            self._tree.stat(path)
        except FileNotFoundError:
            return False
        return True

    def _never(self, request: Request) -> bytes:
        raise OSError(errno.EPERM, "only files and directories")

    def _unsupported(self, request: Request) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    # --- checks ---

    def _writable(self) -> None:
        if self._tree.readonly:
            raise OSError(errno.EROFS, "read-only")

    def _below(self, number: int, raw: bytes) -> str:
        """The path of a name in a directory."""
        path = "" if number == ROOT else self._nodes.path(number)
        if not raw or raw in (b".", b"..") or b"/" in raw:
            raise OSError(errno.EINVAL, "no name")
        if len(raw) > MAX_NAME:
            raise OSError(errno.ENAMETOOLONG, "too long a name")
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise OSError(errno.EILSEQ, "names are UTF-8") from None
        whole = f"{path}/{name}" if path else name
        if is_too_long(whole):
            raise OSError(errno.ENAMETOOLONG, "too long a path")
        return whole


def _counted(limit: int | None, left: int | None, unit: int) -> tuple[int, int]:
    """A limit and what is left of it, in units. A guest that has removed what was there may add more than the limit."""
    if limit is None or left is None:
        return UNLIMITED, UNLIMITED
    return min(max(limit, left, 0), MOST) // unit, min(max(left, 0), MOST) // unit
