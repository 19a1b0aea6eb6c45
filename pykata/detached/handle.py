"""Detached sandboxes by their names: what there is, how they do, and how to end them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
from attrs import evolve, frozen

from pykata import host
from pykata.detached import directory as directories
from pykata.detached.directory import State
from pykata.errors import (
    DetachedEndedError,
    DetachedError,
    DetachedLostError,
    DetachedNotFoundError,
    SandboxClosedError,
    VMDiedError,
)
from pykata.net import leftovers, owned
from pykata.options import check_seconds, check_signal
from pykata.spec import Phase, Reason

if TYPE_CHECKING:
    from pykata.detached.logs import LogPiece


@frozen(kw_only=True)
class Detached:
    """A detached sandbox, as it was when it was looked at. From :meth:`Sandbox.detach` and :func:`find_detached`.

    ::

        sandbox = await Sandbox().detach("worker", "builtin:busybox", ["httpd", "-f"])
        ...
        await sandbox.stop()

    To run commands in it, use :meth:`Sandbox.connect`.
    """

    name: str
    phase: Phase
    """``"starting"``, ``"running"``, ``"ended"``, or ``"lost"``: its keeper was killed, and it with that."""
    image: str | None = None
    """What its main container was made of."""
    args: tuple[str, ...] = ()
    """Its main command."""
    created: float = 0.0
    """When it was asked for, in seconds since 1970."""
    ended: float | None = None
    """When it ended, likewise."""
    keeper: int | None = None
    """The process id of its keeper."""
    vmm: int | None = None
    """The process id of its virtual machine monitor."""
    exit_code: int | None = None
    """That of its main command, 128 + the signal's number when one ended it; None if it was ended without an answer."""
    reason: Reason | None = None
    """How it ended: as in :class:`Completed`."""
    why: str = ""
    """How it ended, in words."""
    lost: str = ""
    """Why files of the host were lost that its main command had: what that wrote there may not have arrived."""

    async def refresh(self) -> Detached:
        """How it is now. Raises DetachedNotFoundError."""
        return find_detached(self.name)

    async def wait(self) -> Detached:
        """Wait until it has ended; returns how. One that has nothing to remember is gone then."""
        from pykata.detached.link import connected

        with suppress(DetachedEndedError, DetachedLostError, DetachedNotFoundError):
            async with connected(directories.find(self.name)) as keeper:
                await keeper.gone()
        return self._after()

    async def stop(self, *, grace: float = 10.0) -> Detached:
        """End it, and wait for that: its main command gets SIGTERM, and SIGKILL after ``grace`` seconds.

        Nothing happens if it has ended. Raises DetachedLostError.
        """
        from pykata.detached.link import connected

        seconds = 0.0 if grace == 0 else check_seconds("grace", grace) or 0.0
        with suppress(DetachedEndedError, DetachedNotFoundError):
            async with connected(directories.find(self.name)) as keeper:
                with suppress(VMDiedError, SandboxClosedError):     # it has ended in this moment
                    await keeper.call("stop", grace=seconds)
                await keeper.gone()
        return self._after()

    async def send_signal(self, number: int) -> None:
        """Send a signal to its main command. One without a command is ended by SIGTERM and SIGKILL.

        Raises DetachedEndedError, DetachedLostError, DetachedNotFoundError, and ConfigError for other signals then.
        """
        from pykata.detached.link import connected

        number = check_signal(number)
        async with connected(directories.find(self.name)) as keeper:
            with suppress(VMDiedError, SandboxClosedError):     # that was its end
                await keeper.call("signal", signal=number)

    async def kill(self) -> None:
        """Send SIGKILL to its main command and all of its descendants, which ends the sandbox."""
        await self.send_signal(signal.SIGKILL)

    async def logs(self, *, follow: bool = False) -> AsyncGenerator[LogPiece]:
        """What its main command has written: the last 8 to 16 MiB of it. ``follow`` goes on until the sandbox ends."""
        from pykata.detached.logs import read

        async with aclosing(read(directories.find(self.name), follow=follow)) as pieces:
            async for piece in pieces:
                yield piece

    async def remove(self) -> None:
        """Forget one that has ended: its log, its exit code, its name. Raises DetachedError while it runs."""
        await anyio.to_thread.run_sync(directories.remove, directories.find(self.name))

    def _after(self) -> Detached:
        try:
            return find_detached(self.name)
        except DetachedNotFoundError:
            return evolve(self, phase="ended", why="it was stopped")


def find_detached(name: str) -> Detached:
    """The detached sandbox of this name, running or not. Raises DetachedNotFoundError, ConfigError."""
    return _of(directories.find(name).read())


def list_detached() -> list[Detached]:
    """All detached sandboxes of this user, those that have ended too, by name."""
    found = []
    for directory in directories.every():
        with suppress(DetachedError):       # it was removed meanwhile, or another version's
            found.append(_of(directory.read()))
    return found


async def collect_garbage() -> list[Path]:
    """Remove what processes left that were killed: run directories, and those of lost detached sandboxes.

    What images take beyond the limit of the cache goes as well, and guest bundles that were built here and that no
    sandbox was booted from for 30 days. Returns what was removed. Nothing that is in use, or has ended in order, is
    touched.
    """
    abandoned = host.abandoned_run_dirs()
    for path in abandoned:
        await leftovers.undo_all(path)
    networks = await owned.collect()
    removed = await anyio.to_thread.run_sync(_collect, abandoned)
    return [*networks, *removed, *await anyio.to_thread.run_sync(_unused)]


def _unused() -> list[Path]:
    from pykata.guest import evict

    return [file.path for file in host.trim_cache()] + evict()


def _collect(abandoned: list[Path]) -> list[Path]:
    removed = []
    for directory in directories.every():
        with suppress(DetachedError):
            if directory.read().phase == "lost":
                directories.remove(directory)
                removed.append(directory.path)
    removed += directories.leftovers()
    for path in abandoned:
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed


def _of(state: State) -> Detached:
    from attrs import asdict

    return Detached(**asdict(state))
