"""Locks on files that other processes respect, for what one of them makes and all of them use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
from anyio.lowlevel import RunVar
from attrs import define

from pykata.host.run import run_tool
from pykata.host.tools import find_tool


@define
class _Turn:
    """Of those in this event loop who want the same lock. They needn't each wait for it on disk."""

    lock: anyio.Lock
    users: int = 0


_turns: RunVar[dict[Path, _Turn]] = RunVar("pykata_lock_turns")


@asynccontextmanager
async def locked(lock: Path) -> AsyncIterator[None]:
    """Hold the lock file at ``lock``, which is made for it and removed afterwards. It goes with us, however we end."""
    async with _turn(lock):
        while True:
            descriptor = open_lock(lock)
            try:
                await _wait_for_lock(descriptor)
                if not is_at(descriptor, lock):     # who had it before has removed it: it is nobody's lock any more
                    continue
                try:
                    yield
                finally:
                    _remove(lock)
                return
            finally:
                os.close(descriptor)


@asynccontextmanager
async def locked_one_of(locks: Sequence[Path]) -> AsyncIterator[None]:
    """Hold one of several locks: one that is free, else one by our number, when its turn has come."""
    for lock in locks:
        lock.touch(mode=0o600)
        if (descriptor := try_lock(lock)) is not None:
            try:
                yield
            finally:
                os.close(descriptor)
            return
    async with locked(locks[os.getpid() % len(locks)]):
        yield


def try_lock(lock: Path) -> int | None:
    """The descriptor of a lock that is there and that nobody holds, or None. Closing it gives the lock up."""
    with suppress(FileNotFoundError):
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(descriptor, lock):
                return descriptor
        except BlockingIOError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    return None


def open_lock(lock: Path) -> int:
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove(lock: Path) -> None:
    lock.unlink(missing_ok=True)


@asynccontextmanager
async def _turn(path: Path) -> AsyncIterator[None]:
    try:
        turns = _turns.get()
    except LookupError:
        turns = {}
        _turns.set(turns)
    turn = turns.setdefault(path, _Turn(anyio.Lock()))
    turn.users += 1
    try:
        async with turn.lock:
            yield
    finally:
        turn.users -= 1
        if not turn.users:
            del turns[path]


async def _wait_for_lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # A thread in flock(2) can't be cancelled; a process can. The lock belongs to the open file description
        # (flock(2)), so it is ours when flock(1) has it, and stays when that ends.
        flock = find_tool("flock", package="util-linux")
        await run_tool([str(flock), "--exclusive", str(descriptor)], pass_fds=[descriptor])
