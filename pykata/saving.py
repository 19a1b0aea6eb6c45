"""Saving a sandbox: to fork it, to keep it on disk, to make a template of it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.to_thread

from pykata import saved
from pykata.errors import AgentError, ConfigError, HostError
from pykata.host import finish
from pykata.origin import Origin
from pykata.restore import identity
from pykata.running import Running
from pykata.spec import SavedVM, Start


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


async def snapshot(running: Running, folder: Path) -> None:
    """Write the sandbox to disk: whole, or not at all."""
    fresh = folder.with_name(f".{folder.name}.part")
    async with as_it_is(running, "snapshot") as found:
        try:
            await anyio.to_thread.run_sync(_write, fresh, folder, found)
        except OSError as exc:
            raise HostError(f"can't write the snapshot {folder}: {exc.strerror}") from exc


def _write(fresh: Path, folder: Path, found: Origin) -> None:
    try:
        saved.write(fresh, found)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


async def resume(running: Running) -> None:
    """Let the guest go on, and tell it how late it is."""
    from pykata.agent.v1 import CloneRequest

    await running.vm.resume()
    async with running.explained():
        await running.agent.clone(CloneRequest())
