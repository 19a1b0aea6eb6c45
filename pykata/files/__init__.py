"""The files of a container. What speaks to the guest is imported by the first operation."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from inspect import isawaitable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from pykata.buffers import bytes_of
from pykata.errors import ConfigError, FileError, FileMissingError, FileNotDirectoryError, FilePresentError
from pykata.files import checks
from pykata.files.paths import ContainerPath, raw, text
from pykata.files.values import FileChange, FileEntry, FileEvent, FileStat, Transfer

if TYPE_CHECKING:
    from pykata.files.handle import ContainerFile, Mode
    from pykata.files.session import Session
    from pykata.files.v1 import Request, SetAttributes
    from pykata.running import Running

__all__ = ["ContainerPath", "FileChange", "FileEntry", "FileEvent", "FileStat", "Files", "Transfer"]

GIB = 1024**3

MAX_READ = 256 * 1024 * 1024
"""Bytes that one ``read_bytes`` takes into memory unless told otherwise."""

MAX_ENTRIES = 250_000
"""Entries that one ``list`` takes into memory unless told otherwise."""

Entries = list[FileEntry]

INLINE = 512 * 1024     # bytes that are written in one message; more are streamed


class Files:
    """The files of a container, named as :class:`pathlib.Path` and :mod:`os` name things. ``container.files`` is one.

    A path is text or a ``PurePosixPath``, absolute or relative to the container's working directory; symlinks are
    followed within the container's root. What is done is done as the user that the container's commands run as.
    Failures raise :class:`FileError` and its kinds, which are also the ``OSError`` that ``pathlib`` would raise.

    An operation that is cancelled may have happened or not, but no file is left half-written by ``write_bytes``.
    """

    def __init__(self, running: Running, container: str, user: str, check: Callable[[], None]) -> None:
        self._running = running
        self._container = container
        self._check = check
        self._user = user
        self._opened: Session | None = None
        self._others: dict[str, Files] = {}

    def as_user(self, user: str) -> Files:
        """The same files, as another user of the container: ``"name"``, ``"uid"``, ``"name:group"``, ``"uid:gid"``."""
        from pykata.command import command

        checked = command(["-"], user=user).user
        if checked in ("", self._user):
            return self
        if checked not in self._others:
            self._others[checked] = Files(self._running, self._container, checked, self._check)
        return self._others[checked]

    # Contents.

    async def read_bytes(
        self, path: ContainerPath, *, offset: int = 0, size: int | None = None, limit: int = MAX_READ
    ) -> bytes:
        """The content of a file, from ``offset`` on, at most ``size`` bytes of it; more than ``limit`` is an error."""
        from pykata.files.handle import Opening, opened
        from pykata.files.reading import all_of, bounded

        checks.number("limit", limit)
        where, how = raw(path), Opening(mode="rb", offset=offset, size=size)
        if size == 0:
            await self.stat(path)
            return b""
        exact = size if size is not None and size <= limit else None
        response = await self._session.ask(how.request(where, b""), where)
        if response.content is not None and not response.content.large:
            return bounded(response.content.data, where, limit, exact)
        async with opened(self._session, where, how) as file:
            return await all_of(file, where, limit, exact)

    async def read_text(self, path: ContainerPath, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The content of a file as text. Line ends are left as they are."""
        return (await self.read_bytes(path)).decode(encoding, errors)

    async def write_bytes(
        self, path: ContainerPath, data: bytes | bytearray | memoryview, *,
        mode: int | None = None, parents: bool = False, atomic: bool = True,
    ) -> int:  # fmt: skip
        """Write a file: what was in it is replaced. Returns the number of bytes.

        The path shows the old content or all of the new one at each moment, whatever fails or is cancelled: a new file
        takes the place of the old one, with its owner and permissions (not its extended attributes and hard links).
        ``atomic=False`` empties and fills the file that is there. ``mode`` is its permissions, exactly; those of a new
        file are ``0o666`` less the container's umask. ``parents`` makes missing directories above it.
        """
        from pykata.files.handle import Opening, opened

        view = bytes_of(data)
        where, how = raw(path), Opening(mode="wb", permissions=mode, parents=parents, atomic=atomic)
        if len(view) <= INLINE:
            await self._done(how.request(where, bytes(view)), where)
        else:
            async with opened(self._session, where, how) as file:
                await file.write(view)
        return len(view)

    async def write_text(
        self, path: ContainerPath, data: str, encoding: str = "utf-8", errors: str = "strict", *,
        mode: int | None = None, parents: bool = False, atomic: bool = True,
    ) -> int:  # fmt: skip
        """Write a file as text, as :meth:`write_bytes` does. Line ends are left as they are."""
        if not isinstance(data, str):
            raise ConfigError(f"data={data!r:.80} is not text", hint="write_bytes writes bytes")
        encoded = data.encode(encoding, errors)
        return await self.write_bytes(path, encoded, mode=mode, parents=parents, atomic=atomic)

    def open(
        self, path: ContainerPath, mode: Mode = "rb", *, offset: int = 0, size: int | None = None,
        permissions: int | None = None, parents: bool = False, atomic: bool = True,
    ) -> AbstractAsyncContextManager[ContainerFile]:  # fmt: skip
        """Open a file as a stream, for ``async with``; each open file has a process of its own in the container.

        ``"rb"`` reads (``size`` bytes from ``offset`` on), ``"wb"`` replaces the file when the block ends without an
        error (with ``atomic=False`` as it is written), ``"xb"`` makes a file that must not be there yet, ``"ab"``
        appends, ``"r+b"`` writes into a file that is there, from ``offset`` on. Devices and FIFOs open, too, and wait
        as they do.
        """
        from pykata.files.handle import Opening, opened

        how = Opening(
            mode=mode, offset=offset, size=size, permissions=permissions, parents=parents,
            atomic=atomic,
        )  # fmt: skip
        return opened(self._session, raw(path), how)

    # Trees.

    async def upload(
        self, source: str | os.PathLike[str], path: ContainerPath, *, owner: tuple[int, int] | None = None,
        keep_owners: bool = False, setuid: bool = False,
    ) -> Transfer:  # fmt: skip
        """Copy a file of the host to ``path``, or what is in a directory of the host into the directory ``path``.

        Permissions, times to the nanosecond, symlinks (as they are), hard links and holes are kept. Everything belongs
        to the user that these operations run as, or to ``owner`` (uid and gid), or with ``keep_owners`` to the numbers
        that the host has. The bits setuid and setgid are only kept with ``setuid``. A missing directory is made; files
        and links that are there are replaced, and other things stay. A file that goes to a directory gets its own name.
        Raises :class:`FileError`, :class:`ConfigError` and :class:`HostError`.
        """
        from pykata.files import v1
        from pykata.files.transfer import upload
        from pykata.paths import check_path

        host = check_path("source", source)
        uid, gid = checks.owners(owner)
        request = v1.Unpack(path=raw(path), uid=uid, gid=gid, keep_owners=keep_owners, keep_setuid=setuid)
        return await upload(self._session, host, request)

    async def download(
        self, path: ContainerPath, target: str | os.PathLike[str], *, setuid: bool = False,
        max_size: int = 16 * GIB, max_entries: int = 1_000_000,
    ) -> Transfer:  # fmt: skip
        """Copy a file to ``target`` on the host, or what is in the directory ``path`` into the directory ``target``.

        Permissions, times, symlinks (as they are: they may lead anywhere), hard links and holes are kept; everything
        belongs to who runs this. The container may be hostile: nothing is written outside of ``target``, no symlink is
        followed there, devices are left out, setuid and setgid only kept with ``setuid``. More than ``max_size`` bytes,
        with the holes of sparse files, or more than ``max_entries`` files, directories and links raise. A missing
        directory is made; files and links that are there are replaced. A file that goes to a directory gets its own
        name, and is there when it is complete. A tree that fails leaves what came before.
        Raises :class:`FileError`, :class:`UnsafeTreeError`, :class:`HostError` and :class:`DiskFullError`.
        """
        from pykata.files.extract import Bounds
        from pykata.files.transfer import download
        from pykata.paths import check_path

        bounds = Bounds(size=max_size, entries=max_entries, setuid=setuid)
        return await download(self._session, raw(path), check_path("target", target), bounds)

    async def upload_tar(
        self, read: Callable[[], Awaitable[bytes] | bytes], path: ContainerPath, *,
        owner: tuple[int, int] | None = None, keep_owners: bool = False, setuid: bool = False,
    ) -> Transfer:  # fmt: skip
        """Unpack a tar in the directory ``path``: ``read`` gives it piece by piece, and nothing at its end.

        It may be of any writer, and compressed by gzip, zstd or xz. Everything else is as for :meth:`upload`; devices
        and FIFOs are left out, and hard links to them. Raises :class:`FileError`, :class:`HostError`, and for what is
        no tar :class:`ConfigError`.
        """
        from pykata.files import v1
        from pykata.files.tars import upload_tar

        uid, gid = checks.owners(owner)
        request = v1.Unpack(path=raw(path), uid=uid, gid=gid, keep_owners=keep_owners, keep_setuid=setuid)
        return await upload_tar(self._session, read, request)

    async def download_tar(
        self, path: ContainerPath, on_data: Callable[[bytes], Awaitable[object] | object], *,
        max_size: int = 16 * GIB, max_entries: int = 1_000_000,
    ) -> Transfer:  # fmt: skip
        """Give ``on_data`` a file, or a directory with all that is in it, as a tar, piece by piece.

        The names in it begin with that of the file or directory. Owners, modes and devices are as in the container,
        which may be hostile: whoever unpacks it should know that. More than ``max_size`` bytes, or more than
        ``max_entries`` files, directories and links raise.
        Raises :class:`FileError`, :class:`UnsafeTreeError` and :class:`HostError`.
        """
        from pykata.files.extract import Bounds
        from pykata.files.tars import download_tar

        return await download_tar(self._session, raw(path), on_data, Bounds(size=max_size, entries=max_entries))

    def watch(
        self, path: ContainerPath = ".", *, recursive: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[FileEvent]]:
        """Changes to a file or directory (``recursive``: to a tree) as they happen, for ``async with``::

            async with container.files.watch("/srv", recursive=True) as events:
                async for event in events:
                    print(event.kind, event.path)

        What happens after the block was entered is told, in order. A file that is made in a new directory may be told
        twice. Only what processes of this guest do is seen, not what another one does to a shared directory.
        """
        from pykata.files.watching import watched

        return watched(self._session, raw(path), recursive=recursive)

    # What is there.

    async def stat(self, path: ContainerPath, *, follow_symlinks: bool = True) -> FileStat:
        """What is known of a file."""
        from pykata.files import v1
        from pykata.files.decode import file_stat

        where = raw(path)
        request = v1.Request(stat=v1.Stat(path=where, follow=follow_symlinks))
        return file_stat(await self._session.attributes(request, where))

    async def lstat(self, path: ContainerPath) -> FileStat:
        """What is known of a file; of a symlink itself."""
        return await self.stat(path, follow_symlinks=False)

    async def exists(self, path: ContainerPath, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a file; not, for a symlink that leads nowhere."""
        return await self._found(path, follow_symlinks) is not None

    async def is_file(self, path: ContainerPath) -> bool:
        """Whether there is a regular file."""
        found = await self._found(path, True)
        return found is not None and found.is_file()

    async def is_dir(self, path: ContainerPath) -> bool:
        """Whether there is a directory."""
        found = await self._found(path, True)
        return found is not None and found.is_dir()

    async def readlink(self, path: ContainerPath) -> str:
        """Where a symlink leads, verbatim."""
        from pykata.files.failures import error

        found = await self.lstat(path)
        if found.target is None:
            raise error(22, "read the link", raw(path), hint="it is no symlink")
        if not found.target:        # of the kernel's own (proc(5)): no other link can be empty
            raise error(13, "read the link", raw(path))
        return found.target

    async def list(self, path: ContainerPath = ".", *, limit: int = MAX_ENTRIES) -> Entries:
        """What is in a directory, sorted by name; more than ``limit`` entries are an error."""
        from pykata.files.reading import entries

        checks.number("limit", limit)
        return await entries(self._session, raw(path), limit)

    async def walk(
        self, path: ContainerPath = ".", *, on_error: Callable[[FileError], object] | None = None
    ) -> AsyncIterator[tuple[PurePosixPath, Entries, Entries]]:
        """Each directory of a tree from the top, as ``(path, directories, others)``, without following symlinks.

        As with ``os.walk``, what is taken out of ``directories`` isn't visited. A directory that can't be listed
        raises, or is passed to ``on_error``, whose result is awaited if it can be; one that has gone meanwhile is
        skipped.
        """
        stack = [PurePosixPath(text(raw(path)))]
        top = stack[0]
        while stack:
            here = stack.pop()
            try:
                found = await self.list(here)
            except FileError as error:
                if here != top and isinstance(error, FileMissingError | FileNotDirectoryError):
                    continue
                if on_error is None:
                    raise
                if isawaitable(told := on_error(error)):
                    await told
                continue
            directories = [entry for entry in found if entry.stat.is_dir()]
            yield here, directories, [entry for entry in found if not entry.stat.is_dir()]
            stack.extend(entry.path for entry in reversed(directories))

    # Changes.

    async def mkdir(
        self, path: ContainerPath, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Make a directory, with ``mode`` less the container's umask."""
        from pykata.files import v1

        where = raw(path)
        request = v1.MakeDirectory(path=where, mode=checks.mode("mode", mode), parents=parents, exist_ok=exist_ok)
        await self._done(v1.Request(make_directory=request), where)

    async def remove(self, path: ContainerPath, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file or an empty directory; ``recursive`` a directory with all that is in it.

        Symlinks are removed, never followed.
        """
        from pykata.files import v1

        where = raw(path)
        request = v1.Request(remove=v1.Remove(path=where, tree=recursive, missing_ok=missing_ok))
        if not recursive:
            await self._done(request, where)
            return
        async with self._session.own() as tool:     # it may take its time
            await tool.begin(request, where)
            await tool.done(None)

    async def rename(self, path: ContainerPath, target: ContainerPath, *, replace: bool = True) -> None:
        """Give a file another path; a file that is there is replaced, unless ``replace`` is false."""
        from pykata.files import v1
        from pykata.files.failures import error

        where = raw(path)
        to = raw(target, "target")
        request = v1.Rename(path=where, target=to, replace=replace)
        try:
            await self._done(v1.Request(rename=request), where)
        except FilePresentError as there:
            raise error(there.errno or 0, "rename to", to) from None

    async def symlink(self, path: ContainerPath, target: ContainerPath) -> None:
        """Make a symlink at ``path`` that leads to ``target``, as ``Path(path).symlink_to(target)``."""
        from pykata.files import v1

        where = raw(path)
        request = v1.MakeSymlink(path=where, target=raw(target, "target"))
        await self._done(v1.Request(make_symlink=request), where)

    async def hardlink(self, path: ContainerPath, target: ContainerPath) -> None:
        """Make ``path`` another name of the file ``target``, as ``Path(path).hardlink_to(target)``."""
        from pykata.files import v1

        where = raw(path)
        request = v1.MakeSymlink(path=where, target=raw(target, "target"), hard=True)
        await self._done(v1.Request(make_symlink=request), where)

    async def chmod(self, path: ContainerPath, mode: int) -> None:
        """Set a file's permissions."""
        from pykata.files import v1

        await self._set(v1.SetAttributes(path=raw(path), follow=True, mode=checks.mode("mode", mode)))

    async def chown(
        self, path: ContainerPath, uid: int | None = None, gid: int | None = None, *, follow_symlinks: bool = True
    ) -> None:
        """Set a file's owner, its group, or both: numbers, as the container has them."""
        from pykata.files import v1

        uid, gid = checks.owner("uid", uid), checks.owner("gid", gid)
        await self._set(v1.SetAttributes(path=raw(path), follow=follow_symlinks, uid=uid, gid=gid))

    async def touch(
        self, path: ContainerPath, mode: int = 0o666, *, exist_ok: bool = True, mtime_ns: int | None = None
    ) -> None:
        """Make an empty file, with ``mode`` less the container's umask, or set the time of one to now, or to
        ``mtime_ns`` (nanoseconds since 1970)."""
        from pykata.files import v1

        if mtime_ns is not None:
            checks.number("mtime_ns", mtime_ns, least=-checks.MAX_SIZE)
        await self._set(v1.SetAttributes(
            path=raw(path), follow=True, create=True, exclusive=not exist_ok, mode=checks.mode("mode", mode),
            mtime_ns=mtime_ns, now=mtime_ns is None,
        ))  # fmt: skip

    async def truncate(self, path: ContainerPath, size: int = 0) -> None:
        """Cut a file to ``size`` bytes, or extend it with zeros (which take no space)."""
        from pykata.files import v1

        checks.number("size", size)
        await self._set(v1.SetAttributes(path=raw(path), follow=True, size=size))

    async def aclose(self) -> None:
        """End what works on the files. The container's block does it."""
        for other in self._others.values():
            await other.aclose()
        if self._opened is not None:
            await self._opened.aclose()

    async def _found(self, path: ContainerPath, follow: bool) -> FileStat | None:
        import errno

        try:
            return await self.stat(path, follow_symlinks=follow)
        except FileError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    async def _done(self, request: Request, path: bytes) -> None:
        await self._session.done(request, path)

    async def _set(self, request: SetAttributes) -> None:
        from pykata.files import v1

        await self._done(v1.Request(set_attributes=request), request.path)

    @property
    def _session(self) -> Session:
        if self._opened is None:
            from pykata.files.session import Session

            self._opened = Session(self._running, self._container, self._user, self._check)
        return self._opened
