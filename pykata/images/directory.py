"""A root filesystem in a directory of the host, read without following any of its symlinks.

The directory may have been made by anybody, and may change while it is read: every step is taken from an open directory
(openat(2)), so nothing but what is below it is ever opened.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from attrs import evolve, frozen

from pykata.errors import ImageCorruptError, ImageError, ImageNotFoundError, ImageUnsupportedError, printable
from pykata.images.apart import without_content, write_apart
from pykata.images.entry import BadEntryError, Entry, Kind, clean_path
from pykata.images.layers import Output
from pykata.images.limits import Limits
from pykata.images.pax import MAX_EXTENTS, OVERLAY
from pykata.images.reference import Reference
from pykata.images.stream import CHUNK
from pykata.images.tar_writer import END, header, padding
from pykata.images.tarball import DEFAULT_CONFIG
from pykata.spec import Image

MAX_DEPTH = 500         # one open descriptor each

_KINDS = {
    stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK, stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK, stat.S_IFIFO: Kind.FIFO,
}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@frozen
class Found:
    """A file that a walk came by: its path, what lstat(2) says, and the open directory that it is in."""

    path: bytes
    status: os.stat_result
    directory: int

    @property
    def name(self) -> bytes:
        return self.path.rpartition(b"/")[2] or b"."


def find_directory(reference: Reference, architecture: str, limits: Limits, poll: Callable[[], None]) -> Image:
    """Find a directory. Its identity is the metadata of all files in it: a change of any of them changes its ctime.

    ``poll`` is called for each file, and may raise to end this.
    """
    root = reference.path.absolute()
    identity = hashlib.sha256(os.fsencode(root))
    for found in _walk(root, limits, poll):
        s = found.status
        identity.update(b"%r %d %d %d %d %d %d %d %d\n" % (
            found.path, s.st_dev, s.st_ino, s.st_mode, s.st_uid, s.st_gid, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    return Image(
        reference=reference.text, digest=f"sha256:{identity.hexdigest()}", config=DEFAULT_CONFIG,
        architecture=architecture, write_tar=partial(_write, root, limits),
        write_apart=partial(_write_apart, root, limits), directory=root,
    )


def _write_apart(root: Path, limits: Limits, dest: IO[bytes], content: Path | None) -> None:
    if content is None:
        _write(root, limits, dest, apart=True)
    else:
        write_apart(partial(_write, root, limits), dest, content)


def _write(root: Path, limits: Limits, dest: IO[bytes], *, apart: bool = False) -> None:
    out = Output(dest)
    write_entries(root, limits, out, dest.flush, apart=apart)
    out.write(END)
    out.flush()


def _as_it_is(entry: Entry) -> Entry | None:
    return entry


def write_entries(
    root: Path, limits: Limits, out: Output, poll: Callable[[], None],
    placed: Callable[[Entry], Entry | None] = _as_it_is, *, apart: bool = False,
) -> None:
    """Write a directory as entries of a tar. ``placed`` makes of an entry's metadata what is written, None for nothing.

    ``apart`` leaves the content of files out, and says where it is: at the same path below ``root``.
    ``poll`` is called for each file, and may raise to end this.
    """
    first: dict[tuple[int, int], bytes] = {}
    total = 0
    for found in _walk(root, limits, poll):
        s = found.status
        entry = placed(_entry(root, found))
        if entry is None:
            continue
        target = first.setdefault((s.st_dev, s.st_ino), entry.path) if s.st_nlink > 1 else entry.path
        if target is not entry.path and not stat.S_ISDIR(s.st_mode):
            out.write(header(Entry(entry.path, Kind.HARDLINK, link=target)))
        elif apart and stat.S_ISREG(s.st_mode) and s.st_size:
            out.write(header(without_content(evolve(entry, size=s.st_size), b"/" + found.path)))
        elif stat.S_ISREG(s.st_mode) and s.st_size:
            total += _write_file(root, found, entry, out)
            if total > limits.size:
                raise ImageCorruptError(f"{root} has more than {limits.size} bytes")
        else:
            out.write(header(entry))


def _write_file(root: Path, found: Found, entry: Entry, out: Output) -> int:
    descriptor = _open(root, found, _FILE)
    try:
        status = os.fstat(descriptor)
        if not os.path.samestat(status, found.status) or status.st_size != found.status.st_size:
            raise _changed(root, found)
        extents = _extents(descriptor, status)
        stored = sum(length for _, length in extents)
        whole = stored == status.st_size
        out.write(header(evolve(entry, size=status.st_size, stored=stored, extents=None if whole else extents)))
        for offset, length in extents:
            while length:
                data = os.pread(descriptor, min(length, CHUNK), offset)
                if not data:
                    raise _changed(root, found)
                out.write(data)
                offset, length = offset + len(data), length - len(data)
        out.write(padding(stored))
    except OSError as exc:
        raise _unreadable(root, found.path, exc) from exc
    finally:
        os.close(descriptor)
    return stored


def _extents(descriptor: int, status: os.stat_result) -> tuple[tuple[int, int], ...]:
    """Where a file has data (lseek(2), SEEK_DATA). A file without holes isn't asked."""
    if status.st_blocks * 512 >= status.st_size:
        return ((0, status.st_size),)
    extents: list[tuple[int, int]] = []
    at = 0
    while at < status.st_size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:        # only a hole follows
                break
            raise
        at = min(os.lseek(descriptor, start, os.SEEK_HOLE), status.st_size)
        extents.append((start, at - start))
    if len(extents) > MAX_EXTENTS:
        return ((0, status.st_size),)
    return tuple(extents)


def _entry(root: Path, found: Found) -> Entry:
    s = found.status
    kind = _KINDS[stat.S_IFMT(s.st_mode)]
    try:
        link = os.readlink(found.name, dir_fd=found.directory) if kind is Kind.SYMLINK else b""
        xattrs = _xattrs(found)
    except OSError as exc:
        raise _unreadable(root, found.path, exc) from exc
    return Entry(
        found.path, kind, stat.S_IMODE(s.st_mode), s.st_uid, s.st_gid, int(s.st_mtime_ns // 10**9), link=link,
        xattrs=xattrs, device=(os.major(s.st_rdev), os.minor(s.st_rdev)) if kind in (Kind.CHAR, Kind.BLOCK) else (0, 0),
    )


def _xattrs(found: Found) -> tuple[tuple[bytes, bytes], ...]:
    # There is no lgetxattr "at"; through /proc the directory is the one that is open, and the name isn't followed.
    path = b"/proc/self/fd/%d/%s" % (found.directory, found.name)
    try:
        names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
    except OSError as exc:
        if exc.errno == errno.ENOTSUP:
            return ()
        raise
    # SELinux's labels belong to the policy of this host.
    kept = sorted(name for name in names if name != b"security.selinux" and not name.startswith(OVERLAY))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in kept)


def _walk(root: Path, limits: Limits, poll: Callable[[], None]) -> Iterator[Found]:
    """Every file below ``root``, each directory before what is in it, sorted by name.

    Other filesystems that are mounted below it are taken for empty (a chroot may have its /proc), sockets for nothing:
    without the process that listens there they mean nothing (GNU tar leaves them out, too).
    """
    count = 0
    try:
        descriptor = os.open(root, _DIRECTORY & ~os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageNotFoundError(f"{root} is not a directory") from None
    except OSError as exc:
        raise _unreadable(root, b"", exc) from exc
    open_directories = [descriptor]
    try:
        top = os.fstat(descriptor)
        yield Found(b"", top, descriptor)
        stack = [_list(root, b"", descriptor)]
        while stack:
            found = next(stack[-1], None)
            if found is None:
                stack.pop()
                os.close(open_directories.pop())
                continue
            poll()
            count += 1
            if count > limits.entries:
                raise ImageCorruptError(f"{root} has more than {limits.entries} files")
            yield found
            if stat.S_ISDIR(found.status.st_mode) and found.status.st_dev == top.st_dev:
                if len(stack) > MAX_DEPTH:
                    raise ImageUnsupportedError(f"{root} has directories that are nested more than {MAX_DEPTH} deep")
                open_directories.append(_open(root, found, _DIRECTORY))
                stack.append(_list(root, found.path, open_directories[-1]))
    finally:
        for descriptor in open_directories:
            os.close(descriptor)


def _list(root: Path, path: bytes, directory: int) -> Iterator[Found]:
    prefix = path + b"/" if path else b""
    try:
        for name in sorted(os.fsencode(name) for name in os.listdir(directory)):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_IFMT(status.st_mode) in _KINDS:
                yield Found(clean_path(prefix + name), status, directory)
    except BadEntryError as exc:
        raise ImageUnsupportedError(f"{root} has a file that no image can have: {exc.why}") from exc
    except OSError as exc:
        raise _unreadable(root, path, exc) from exc


def _open(root: Path, found: Found, flags: int) -> int:
    try:
        return os.open(found.name, flags, dir_fd=found.directory)
    except OSError as exc:
        raise _unreadable(root, found.path, exc) from exc


def _unreadable(root: Path, path: bytes, exc: OSError) -> ImageError:
    return ImageError(f"can't read {printable(path or b'.', 4096)!r} of {root}: {exc.strerror}")


def _changed(root: Path, found: Found) -> ImageCorruptError:
    return ImageCorruptError(f"{printable(found.path, 4096)!r} of {root} changed while it was read")
