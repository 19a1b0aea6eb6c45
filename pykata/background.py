"""A process that outlives the call that started it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from pykata.process import ask
from pykata.running import ProcessId, Running

if TYPE_CHECKING:
    from pykata.agent.v1 import InspectResponse, SignalRequestScope


class Background:
    """A process that runs until it ends or its container is left. Made by ``container.start(...)``.

    Nothing of it is on the host: it may write as much as it wants, and needs nobody who reads.
    """

    def __init__(self, running: Running, identity: ProcessId, args: tuple[str, ...], pid: int) -> None:
        self._running = running
        self._identity = identity
        self.args = args
        """The command, as it was started."""
        self.pid = pid
        """Its process id in the container."""
        self._returncode: int | None = None

    @property
    def returncode(self) -> int | None:
        """Exit code, 128 + the signal's number when one ended it; None until :meth:`wait` or :meth:`poll` told it."""
        return self._returncode

    async def wait(self) -> int:
        """Wait until it has ended; returns its exit code.

        Raises :class:`AgentRefusedError` when its container is gone, or when 256 others have ended there after it.
        """
        while self._returncode is None:
            await self._inspect(wait=True)
        return self._returncode

    async def poll(self) -> int | None:
        """Its exit code if it has ended, else None. Doesn't wait."""
        if self._returncode is None:
            await self._inspect()
        return self._returncode

    async def log(self) -> bytes:
        """The end of what it wrote to stdout and stderr: as many bytes as ``start`` was told to keep."""
        return (await self._inspect()).log

    async def send_signal(self, number: int) -> None:
        """Send a signal to its process group. Nothing happens when it has ended."""
        from pykata.agent.v1 import SignalRequestScope

        await self._signal(number, SignalRequestScope.GROUP)

    async def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        await self.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL to it and to all its descendants, whatever their group."""
        from pykata.agent.v1 import SignalRequestScope

        await self._signal(signal.SIGKILL, SignalRequestScope.TREE)

    async def _signal(self, number: int, scope: SignalRequestScope) -> None:
        if self._returncode is None:
            await ask(self._running, lambda: self._running.agent.signal(*self._identity, number, scope))

    async def _inspect(self, *, wait: bool = False) -> InspectResponse:
        async with self._running.explained():
            known = await self._running.agent.inspect(*self._identity, wait=wait)
        if known.exited is not None:
            self._returncode = known.exited.exit_code
        return known
