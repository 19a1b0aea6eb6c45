"""Where bundles are kept: entries that appear as a whole or not at all, and the lock of those who build them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio

from pykata.host import cache_dir, run_tool

Waiting = Callable[[str], None]
SHORT = 16              # digits of a hash that are enough for a name


def cache_root() -> Path:
    """The user's cache of guest bundles."""
    return cache_dir() / "guest"


def part_path(root: Path, name: str, digest: str) -> Path:
    """Where a part of bundles is kept."""
    return root / "parts" / f"{name}-{digest[:SHORT]}"


@asynccontextmanager
async def locked(root: Path, waiting: Waiting) -> AsyncIterator[None]:
    """Only one process builds below ``root`` at a time; ``waiting`` is told who holds the lock."""
    fd = _open_lock(root)
    try:
        await _acquire(fd, waiting)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        await anyio.to_thread.run_sync(_collect, root)
        yield
    finally:
        os.close(fd)


def _open_lock(root: Path) -> int:
    root.mkdir(parents=True, exist_ok=True)
    return os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


async def _acquire(fd: int, waiting: Waiting) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting(_holder(os.pread(fd, 20, 0)))
        # flock(1) shares our open file, so what it locks is ours; unlike a thread in flock(2) it can be cancelled.
        await run_tool(["flock", "--exclusive", str(fd)], pass_fds=(fd,))


def _holder(raw: bytes) -> str:
    pid = raw.decode("ascii", "replace").strip() or "?"
    try:
        words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({b' '.join(words).decode(errors='replace').strip()[:80]})"


def _collect(root: Path) -> None:
    # Whoever made these held the lock that we hold now, so it is dead.
    for leftover in root.glob("tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """A directory on the cache's own filesystem, for what isn't finished. Call it with the lock held."""
    path = Path(tempfile.mkdtemp(prefix="tmp-", dir=root))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def publish(finished: Path, target: Path) -> None:
    """Make ``finished`` appear at ``target``, also after a power cut; a damaged one that was there goes away."""
    for path in finished.iterdir():
        _sync(path)
    _sync(finished)
    if target.exists():
        target.rename(Path(tempfile.mkdtemp(prefix="tmp-old-", dir=target.parent), "old"))
    finished.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
