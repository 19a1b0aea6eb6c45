"""Saving a sandbox: to fork it, to keep it on disk, to make a template of it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio
import anyio.to_thread

from pykata import saved
from pykata.errors import AgentError, ConfigError, DiskFullError, HostError
from pykata.host import finish, open_lock, try_lock
from pykata.origin import Origin
from pykata.restore import identity
from pykata.running import Running
from pykata.spec import SavedVM, Start

LOCK = "lock"       # in a directory that isn't whole: held by who writes it


def origin(
    running: Running, vm: SavedVM, start: Start, greeting: bytes, *, parked: bool = False, idle: bool = False,
    signal: int = 0,
) -> Origin:  # fmt: skip
    """What a sandbox has to know to go on from this one."""
    return Origin(
        vm=vm, greeting=greeting, parked=parked, memory_limit=running.memory_limit, start=start, signal=signal,
        containers=tuple(running.containers.values()), main=running.main, idle=idle,
        next_number=running.next_number(), identity=identity(running.options),
    )  # fmt: skip


@asynccontextmanager
async def as_it_is(running: Running, start: Start, *, signal: int = 0) -> AsyncIterator[Origin]:
    """The sandbox with all that runs in it, as long as the block runs."""
    running.check()
    if running.options.uses_host:
        raise ConfigError("this sandbox can't be saved: it has directories or disks of the host",
                          hint="use Tmpfs volumes, or copy files in")
    if not running.vm.can_be_saved:
        raise ConfigError("this sandbox can't be saved",
                          hint="it takes emulation, an agent on a serial port, and no network or directory of the host")
    async with AsyncExitStack() as stack:
        async with running.making:
            try:
                async with running.explained():
                    await running.agent.hold(True)
                vm = await stack.enter_async_context(running.vm.saved())
            finally:
                await finish(_let_go(running))
            found = origin(running, vm, start, running.agent.greeting, signal=signal)
        yield found


async def _let_go(running: Running) -> None:
    """Processes end with their connection again. If that can't be said, there is no connection."""
    with suppress(AgentError):
        await running.agent.hold(False)


async def fork(stack: AsyncExitStack, running: Running, signal: int) -> Origin:
    """The sandbox as it is; what that takes of memory is on its ``stack``."""
    return await stack.enter_async_context(as_it_is(running, "fork", signal=signal))


async def snapshot(running: Running, path: str | os.PathLike[str]) -> None:
    """Write the sandbox to disk: whole, or not at all."""
    folder = _place(path)
    async with as_it_is(running, "snapshot") as found:
        try:
            await anyio.to_thread.run_sync(_write, folder, found)
        except OSError as exc:
            kind = DiskFullError if exc.errno in (errno.ENOSPC, errno.EDQUOT) else HostError
            raise kind(f"can't write the snapshot {folder}: {exc.strerror}") from exc


def _place(path: str | os.PathLike[str]) -> Path:
    """Where a snapshot can be written. Raises ConfigError."""
    folder = Path(path)
    if folder.name in ("", "..") or "\0" in folder.name:
        raise ConfigError(f"path={os.fspath(path)!r} is no place for a snapshot", hint="name a directory to be made")
    folder = folder.absolute()
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"path={os.fspath(path)!r} is there already", hint="name a directory to be made")
    return folder


def _write(folder: Path, found: Origin) -> None:
    with _part(folder.parent) as part:
        saved.write(part / "guest", found)
        (part / "guest").rename(folder)


@contextmanager
def _part(parent: Path) -> Iterator[Path]:
    """A directory of one's own beside a snapshot, while it is written. What was left by those who were killed goes."""
    for left in parent.glob(".pykata-*.part"):
        _collect(left)
    part, lock = _locked_part(parent)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)


def _locked_part(parent: Path) -> tuple[Path, int]:
    while True:
        part = parent / f".pykata-{os.urandom(4).hex()}.part"
        part.mkdir(mode=0o700)
        with suppress(FileNotFoundError):       # somebody has taken it for one that was left
            os.close(open_lock(part / LOCK))
            if (lock := try_lock(part / LOCK)) is not None:
                return part, lock


def _collect(part: Path) -> None:
    if (lock := try_lock(part / LOCK)) is not None:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)
    elif not (part / LOCK).exists():
        with suppress(OSError):
            part.rmdir()


async def resume(running: Running) -> None:
    """Let the guest go on, and tell it how late it is."""
    from pykata.agent.v1 import CloneRequest

    await running.vm.resume()
    async with running.explained():
        await running.agent.clone(CloneRequest())
