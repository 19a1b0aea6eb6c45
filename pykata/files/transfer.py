"""Trees of files between the host and a container, as tars on their way and unpacked at their end.

Host files are read in a thread at the other end of a pipe, and written in one likewise. Whatever ends
the transfer ends what the thread gets or may write, and that ends the thread; we never leave before it has ended.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar, cast

import anyio
from attrs import define

from pykata.errors import ConfigError, FileMissingError, HostError
from pykata.files import v1
from pykata.files.extract import Bounds, Extractor
from pykata.files.pack import write_file, write_tree
from pykata.files.piped import Piped
from pykata.files.session import Session
from pykata.files.threads import ended, in_thread, pipe_for, result_of
from pykata.files.tool import Tool
from pykata.files.values import Transfer
from pykata.host import PipeReader, PipeWriter, finish

T = TypeVar("T")


async def upload(session: Session, source: Path, request: v1.Unpack) -> Transfer:
    """Copy a file or a directory of the host to a path of the container."""
    try:
        found = await _in_host_thread(lambda: os.stat(source), source)
    except HostError as exc:
        raise ConfigError(f"source={str(source)!r} can't be read: {exc.__cause__}") from exc
    if stat.S_ISDIR(found.st_mode):
        return await upload_tree(session, source, request)
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"source={str(source)!r} is neither a file nor a directory")
    return await upload_file(session, source, request)


async def _is_directory(session: Session, path: bytes) -> bool:
    try:
        return stat.S_ISDIR((await session.attributes(v1.Request(stat=v1.Stat(path=path, follow=True)), path)).mode)
    except FileMissingError:
        return False


async def upload_tree(session: Session, source: Path, request: v1.Unpack) -> Transfer:
    """Unpack what is in a directory of the host into one of the container."""
    return await _unpacked(session, request, lambda pipe: write_tree(os.fsencode(source), pipe), source)


async def upload_file(session: Session, source: Path, request: v1.Unpack) -> Transfer:
    """Write a file of the host to a path of the container, or into the directory that is there."""
    name = os.fsencode(source.name)
    if not request.path.endswith(b"/") and not await _is_directory(session, request.path):
        parent, _, name = request.path.rpartition(b"/")
        request.path = parent or (b"/" if request.path.startswith(b"/") else b".")
    return await _unpacked(session, request, lambda pipe: write_file(os.fsencode(source), name, pipe), source)


async def _unpacked(
    session: Session, request: v1.Unpack, write: Callable[[int], Transfer], source: Path
) -> Transfer:
    async with session.own() as tool:
        await tool.begin(v1.Request(unpack=request), request.path)
        await tool.done()
        tool.idle = False
        transfer = await _sent(tool, write, source)
        await tool.complete()
        return transfer


async def download(session: Session, path: bytes, target: Path, bounds: Bounds) -> Transfer:
    """Write a file, or what is in a directory of the container, to the host."""
    request = v1.Request(stat=v1.Stat(path=path, follow=True))
    is_directory = stat.S_ISDIR((await session.attributes(request, path)).mode)
    name = None if is_directory else path.rstrip(b"/").rpartition(b"/")[2]
    async with place_for(target, name, directory=is_directory) as place, session.own() as tool:
        await tool.begin(v1.Request(pack=v1.Pack(path=path)), path)
        await tool.done()
        tool.idle = False
        extractor = Extractor(place.top, bounds, place.passing, place.made)
        return await received(tool, extractor.extract, target)


@asynccontextmanager
async def place_for(target: Path, name: bytes | None = None, *, directory: bool = False) -> AsyncIterator[Place]:
    """Where a download goes: it is complete when the block ends without an error.

    ``name`` is what a file is called if ``target`` is a directory; without it that is an error.
    """
    place = await _in_host_thread(lambda: open_target(target, name, directory), target, undo=Place.close)
    try:
        yield place
        await _in_host_thread(place.keep, target)
    finally:
        place.close()


async def _sent(tool: Tool, write: Callable[[int], Transfer], source: Path) -> Transfer:
    """Pass on what a thread writes to a pipe."""
    reader, writer = pipe_for(source)
    out = PipeReader(cast(IO[bytes], os.fdopen(reader, "rb", buffering=0)))
    work = in_thread(lambda: write(writer), unbegun=lambda: os.close(writer))
    try:
        await tool.send_from(out.receive_into)
    finally:
        out.close()                 # the thread, if it isn't done, gets a BrokenPipeError
        await finish(ended(work))
        work.exception()            # asked for in any case: asyncio complains of a failure that nobody has looked at
    return result_of(work, source)


async def received(tool: Tool, take: Callable[[Piped], T], target: Path) -> T:
    """Pass on to a thread what a tool sends; returns what ``take`` makes of it there.

    A failure of the guest is raised even if ``take`` found nothing wrong; what it made must then be worth nothing.
    """
    reader, writer = pipe_for(target)

    def taken() -> T:
        with Piped.reading(reader) as source:
            return take(source)

    work = in_thread(taken, unbegun=lambda: os.close(reader))
    into = PipeWriter(cast(IO[bytes], os.fdopen(writer, "wb", buffering=0)))
    try:
        with suppress(anyio.BrokenResourceError), tool.diverted(writer):    # the thread that takes no more says why
            while piece := await tool.data():
                await into.send(piece)
    finally:
        into.close()                # the thread, if it isn't done, finds the archive cut off
        await finish(ended(work))
        work.exception()
    return result_of(work, target)


@define
class Place:
    """Where a download goes: a directory, or a file in one that gets its ``name`` when it is complete."""

    top: int
    name: bytes = b""
    passing: bytes | None = None
    made: bool = False
    """It wasn't there before."""

    def create(self) -> IO[bytes]:
        """The file, new and empty, without its name."""
        assert self.passing is not None
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(self.passing, flags, 0o644, dir_fd=self.top), "wb")

    def keep(self) -> None:
        """It is complete."""
        if self.passing is not None:
            os.rename(self.passing, self.name, src_dir_fd=self.top, dst_dir_fd=self.top)
            self.passing = None

    def close(self) -> None:
        """Give everything back; a file that isn't complete goes."""
        if self.passing is not None:
            with suppress(OSError):
                os.unlink(self.passing, dir_fd=self.top)
        os.close(self.top)


def open_target(target: Path, name: bytes | None, directory: bool) -> Place:
    """Where a directory is written to, or a file.

    As with ``shutil.copy``, a file goes into a directory that is there, under its own name.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if directory:
        made = not target.is_dir()
        target.mkdir(parents=True, exist_ok=True)
        return Place(os.open(target, flags), made=made)
    parent, only = target.parent, os.fsencode(target.name)
    if name is not None and target.is_dir():
        parent, only = target, name
    if only in (b"", b".", b"..") or (parent / os.fsdecode(only)).is_dir():
        raise ConfigError(f"target={str(target)!r} is a directory, not a file")
    return Place(os.open(parent, flags), only, b".pykata-" + os.urandom(8).hex().encode())


async def _in_host_thread(work: Callable[[], T], path: Path, undo: Callable[[T], None] | None = None) -> T:
    """What ``work`` returns; a result that a cancellation keeps from its caller is passed to ``undo``."""
    task = in_thread(work)
    try:
        await finish(ended(task))
    except BaseException:
        if task.exception() is None and undo is not None:
            undo(task.result())
        raise
    return result_of(task, path)
