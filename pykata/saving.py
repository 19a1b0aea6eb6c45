"""Saving a sandbox: to fork it, to keep it on disk, to make a template of it."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path

import anyio
import anyio.to_thread
from attrs import evolve

from pykata import saved
from pykata.admission import giving
from pykata.ahead import Ahead, NextFork
from pykata.concurrency import together
from pykata.errors import AgentError, ConfigError, DiskFullError, HostError, PykataError, VMError
from pykata.host import finish, open_lock, try_lock
from pykata.hypervisors.base import Coming
from pykata.net.none import NoNetwork
from pykata.options import Options, forked
from pykata.origin import Origin
from pykata.restore import identity
from pykata.running import Running
from pykata.spares import Spares
from pykata.spec import SavedVM, Start

LOCK = "lock"       # in a directory that isn't whole: held by who writes it


def origin(
    running: Running, vm: SavedVM, start: Start, greeting: bytes, *, parked: bool = False, idle: bool = False
) -> Origin:
    """What a sandbox has to know to go on from this one."""
    return Origin(
        vm=vm, greeting=greeting, parked=parked, memory_limit=running.memory_limit, start=start,
        containers=tuple(running.containers.values()), main=running.main, idle=idle,
        next_number=running.next_number(), identity=identity(running.options), bundle=running.bundle,
    )  # fmt: skip


@asynccontextmanager
async def as_it_is(
    running: Running, start: Start, begun: Coming | None = None, ahead: Ahead | None = None
) -> AsyncIterator[Origin]:
    """The sandbox with all that runs in it, as long as the block runs.

    ``begun`` is what was begun of saving it, and ``ahead`` the machine that goes on from there.
    """
    running.check()
    check_savable(running)
    async with AsyncExitStack() as stack:
        with _explained():
            found = await _saved(stack, running, start, begun, ahead)
        yield found


async def _saved(
    stack: AsyncExitStack, running: Running, start: Start, begun: Coming | None, ahead: Ahead | None
) -> Origin:
    async with running.making:
        await running.settled()     # nothing is half gone in whoever goes on from here
        running.check()         # it may have been paused while this waited
        coming = begun if begun is not None else await stack.enter_async_context(running.vm.coming())
        async with ahead.starting(coming.vm) if ahead else nullcontext():
            try:
                async with running.explained():
                    await together(running.agent.hold_all(), coming.prepare())
                vm = await stack.enter_async_context(running.vm.saved(coming))
                if ahead is not None:
                    ahead.complete(vm)
            finally:
                await finish(_let_go(running))
        return origin(running, vm, start, running.agent.greeting)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except PykataError:
        raise
    except OSError as exc:      # no descriptors are left, say
        raise HostError(f"can't save the virtual machine: {exc}") from exc


def check_savable(running: Running) -> None:
    """Raise ConfigError that says why this sandbox can't be saved, if it can't."""
    options = running.options
    if options.fs.shared:
        raise ConfigError(f"this sandbox can't be saved: fs={options.fs.name!r} shares files of the host with it",
                          hint="fs='block' doesn't")
    if options.host_places:
        raise ConfigError("this sandbox can't be saved: it has directories or disks of the host, at "
                          f"{', '.join(options.host_places)}", hint="use Tmpfs volumes, or copy files in")
    if options.network.strategy != NoNetwork():
        raise ConfigError("this sandbox can't be saved: it has a network, and each that goes on from it would have the "
                          "same addresses there", hint="leave network out")
    if running.vm.unsavable:
        raise ConfigError(f"this sandbox can't be saved: {running.vm.unsavable}")


async def _let_go(running: Running) -> None:
    """Processes end with their connection again. If that can't be said, there is no connection."""
    with suppress(AgentError):
        await running.agent.let_go()


async def fork(stack: AsyncExitStack, running: Running) -> Options:
    """What goes on from the sandbox as it is has these options; what that takes of memory is on its ``stack``."""
    running.check()
    check_savable(running)
    if running.next_fork is None:
        following = NextFork(running.vm, running.options, running.bundle)
        running.next_fork = await stack.enter_async_context(following.kept())
    async with AsyncExitStack() as making:
        with _explained():
            coming, machine = await _begun(making, running, running.next_fork)
        async with machine as ahead:
            found = await making.enter_async_context(as_it_is(running, "fork", coming, ahead))
            options = forked(running.options, found)
            spares = Spares(options, found, 0, running.next_fork.want)
            making.push_async_callback(lambda: finish(spares.drain()))
            making.enter_context(giving(spares.give_up))
            if (first := ahead.take()) is not None:
                spares.add(first)
        # Children that are entered late, or never, shall not have many machines wait for them.
        last, running.ahead = running.ahead, spares
        if last is not None:
            await finish(last.drain())
        stack.push_async_exit(making.pop_all())
    return evolve(options, spares=spares)


async def _begun(making: AsyncExitStack, running: Running, following: NextFork) -> tuple[Coming, Ahead]:
    """What was begun for this fork when the last one was over, or is begun now."""
    if (waiting := following.take()) is not None:
        making.push_async_exit(waiting.stack)
        return waiting.coming, waiting.ahead
    coming = await making.enter_async_context(running.vm.coming())
    return coming, Ahead(running.options, running.bundle)


async def snapshot(running: Running, path: str | os.PathLike[str]) -> None:
    """Write the sandbox to disk: whole, or not at all."""
    folder = _place(path)
    async with as_it_is(running, "snapshot") as found:
        try:
            await finish(anyio.to_thread.run_sync(_write, folder, found))     # it uses what is closed afterwards
        except OSError as exc:
            kind = DiskFullError if exc.errno in (errno.ENOSPC, errno.EDQUOT) else HostError
            raise kind(f"can't write the snapshot {folder}: {exc.strerror}") from exc


def _place(path: str | os.PathLike[str]) -> Path:
    """Where a snapshot can be written. Raises ConfigError."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path={path!r} is not a path", hint="name a directory to be made")
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
        with suppress(OSError):     # another user's, say, in a directory that is shared
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


async def pause(running: Running) -> None:
    """Stop the guest. Nothing else is under way that needs it then."""
    async with running.making:
        await running.settled()
        await running.agent.rest()      # while it stands still it gives no slot back to who wants one
        try:
            await running.vm.pause()
        except asyncio.CancelledError:
            running.is_paused = True        # it may have been: to resume one that runs does no harm
            raise
        except VMError:
            running.agent.go_on()
            raise
        running.is_paused = True


async def resume(running: Running) -> None:
    """Let the guest go on, and tell it how late it is."""
    from pykata.agent.v1 import CloneRequest

    try:
        await running.vm.resume()
    except VMError as error:
        raise await running.why_not(error) from error
    running.is_paused = False
    running.resumed.set()
    running.resumed = anyio.Event()
    running.agent.go_on()
    async with running.explained():
        await running.agent.clone(CloneRequest())
