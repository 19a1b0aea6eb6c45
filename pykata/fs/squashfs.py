"""Makes a squashfs of an image with ``tar2sqfs`` (squashfs-tools-ng), fed through a pipe: no file of it is unpacked."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import IO, Any, cast

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from pykata import host
from pykata.errors import DiskFullError, ToolFailedError

log = logging.getLogger(__name__)

FORMAT = 1
"""Of what :func:`convert` makes of an image: change it when the same image gives other bytes."""

COMPRESSORS = {
    "lz4": ("--compressor", "lz4"),
    "zstd": ("--compressor", "zstd", "--comp-extra", "level=3"),    # its default of 15 takes 40 times as long
}
ROOM = 1024 * 1024              # bytes; more than the tool writes at a time
PIPE_SIZE = 1024 * 1024         # bytes; the most that a user may ask for (/proc/sys/fs/pipe-max-size)

# squashfs has room for user, trusted and security attributes only. The only others that images have are POSIX ACLs.
_NO_ACL = b"squashfs does not support xattr prefix of "

_turns: RunVar[anyio.CapacityLimiter] = RunVar("pykata_squashfs_turns")


def converter() -> Path:
    """The program that makes a squashfs of a tar. Raises ToolMissingError."""
    return host.find_tool("tar2sqfs", package="squashfs-tools-ng")


async def convert(write_tar: Callable[[IO[bytes]], None], path: Path, compression: str) -> None:
    """Write the squashfs of what ``write_tar`` writes to ``path``.

    The same tar gives the same bytes. However this ends, no process and no thread of it is left; a file may be. Raises
    :class:`~pykata.errors.ImageError` and :class:`~pykata.errors.HostError`.
    """
    argv = [str(converter()), "--quiet", "--force", "--defaults", "mtime=0", *COMPRESSORS[compression], str(path)]
    async with _limiter(), AsyncExitStack() as stack:
        # Held open, so that we see what became of it: the tool removes it when it fails.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        stack.callback(os.close, file)
        read_end, write_end = os.pipe()
        feed = _Feed(write_end)
        stack.callback(feed.close)
        with suppress(PermissionError):     # the user has too many pipes; a small one will do
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        try:
            process = await stack.enter_async_context(
                host.spawn(argv, stdin=read_end, stderr=host.PIPE, env=host.TOOL_ENV, kill=host.KILL))
        finally:
            os.close(read_end)              # when the tool ends, writing to the pipe must fail
        try:
            await _feed(process, feed, write_tar)
        except ToolFailedError as exc:
            if await host.finish(asyncio.to_thread(_is_full, file)):
                raise DiskFullError(f"no space left for {path}") from exc
            raise


def _limiter() -> anyio.CapacityLimiter:
    # Each conversion keeps two cores busy; more of them at a time only make all of them late.
    try:
        return _turns.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(os.cpu_count() or 1)
        _turns.set(limiter)
        return limiter


async def _feed(process: host.HostProcess, feed: _Feed, write_tar: Callable[[IO[bytes]], None]) -> None:
    messages = asyncio.ensure_future(_collect(process))
    exited = asyncio.ensure_future(process.wait())
    # The thread runs in a task of its own, out of reach of any cancellation: it ends because the feed tells it to, or
    # because the tool that reads from it is gone, and we only leave after it.
    writing = asyncio.ensure_future(anyio.to_thread.run_sync(_write, write_tar, feed))
    try:
        await asyncio.wait({writing, exited}, return_when=asyncio.FIRST_COMPLETED)
        if not exited.done() and isinstance(writing.exception(), BrokenPipeError | None):
            await asyncio.wait({exited})        # it finishes its file, or says why it wants no more
    finally:
        feed.abandoned = True
        process.kill()
        await host.finish(_ended(writing, exited, messages))
    failure = writing.exception()
    if failure is not None and not isinstance(failure, _AbandonedError | BrokenPipeError):
        raise failure                           # the tool, which we killed then, isn't to blame
    if failure is not None or process.returncode != 0:
        assert process.returncode is not None
        why = host.describe_exit(process.returncode)
        raise ToolFailedError(f"tar2sqfs {why}", output=messages.result()) from failure


def _is_full(file: int) -> bool:
    """Whether nothing more fits into the file: of a write that fails the tool only says "I/O error"."""
    try:
        os.posix_fallocate(file, os.fstat(file).st_size, ROOM)
    except OSError as exc:
        return exc.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _collect(process: host.HostProcess) -> str:
    """The end of what the tool says. Raises what it skips, unless squashfs just can't have it."""
    assert process.stderr is not None
    tail, rest, acls = bytearray(), b"", 0
    async for chunk in process.stderr:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if _NO_ACL in line:
                acls += 1
            else:
                tail += line + b"\n"
        rest = rest[-host.TAIL:]
        del tail[:-host.TAIL]
    if acls:
        log.warning("%d access control lists of the image are left out: squashfs has none", acls)
    return (bytes(tail) + rest).decode(errors="backslashreplace")


class _AbandonedError(Exception):
    """Nobody waits for this tar any more."""


def _write(write_tar: Callable[[IO[bytes]], None], feed: _Feed) -> None:
    write_tar(cast(IO[bytes], feed))
    feed.close()        # the tool finishes its file when it sees the end


class _Feed:
    """Our end of the pipe, as the file that ``write_tar`` writes to from its thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.abandoned = False

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        while view:
            self.flush()
            view = view[os.write(self._descriptor, view):]
        return len(data)

    def flush(self) -> None:
        if self.abandoned:
            raise _AbandonedError

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
