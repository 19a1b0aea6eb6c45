"""Work on the host's files in threads, each at one end of a pipe, and how it fails."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import anyio

from pykata.errors import DiskFullError, FileError, HostError
from pykata.files.piped import pipe

T = TypeVar("T")


def pipe_for(path: Path) -> tuple[int, int]:
    """A pipe to or from the thread that works on this path. Raises HostError."""
    try:
        return pipe()
    except OSError as exc:
        raise host_error(exc, path) from exc


def in_thread(work: Callable[[], T], unbegun: Callable[[], object] = lambda: None) -> asyncio.Future[T]:
    """Work whose task is out of reach of any cancellation: who starts it waits until it has ended.

    ``unbegun`` is called in place of work that never begins, and gives back what that would have.
    """
    return asyncio.ensure_future(_threaded(work, unbegun))


async def _threaded(work: Callable[[], T], unbegun: Callable[[], object]) -> T:
    has_begun = False

    def begun() -> T:
        nonlocal has_begun
        has_begun = True
        return work()

    try:
        return await anyio.to_thread.run_sync(begun)
    except RuntimeError as exc:
        if has_begun:
            raise
        raise OSError(errno.EAGAIN, "no thread can be started") from exc
    finally:
        if not has_begun:
            unbegun()


async def ended(work: asyncio.Future[T]) -> None:
    """Wait for the end of work in a thread, however it ends."""
    await asyncio.wait([work])


def result_of(work: asyncio.Future[T], path: Path) -> T:
    """What has ended gave, or why it failed."""
    try:
        return work.result()
    except OSError as exc:
        raise host_error(exc, path) from exc


def host_error(exc: OSError, path: Path) -> Exception:
    """What the host's kernel said, as an error of ours."""
    if isinstance(exc, FileError):
        return exc
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"no space left for {path}")
    return HostError(f"can't copy from or to {path} on the host: {exc}")
