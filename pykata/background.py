"""A process that outlives the call that started it."""

from __future__ import annotations

import signal as signals
from typing import TYPE_CHECKING

from pykata.options import check_signal
from pykata.process import ask, reason_of
from pykata.running import ProcessId, Running
from pykata.spec import Reason

if TYPE_CHECKING:
    from pykata.agent.v1 import Exited, InspectResponse, SignalRequestScope


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
        self._exited: Exited | None = None

    @property
    def returncode(self) -> int | None:
        """Exit code, 128 + the signal's number when one ended it; None until :meth:`wait` or :meth:`poll` told it."""
        return self._exited.exit_code if self._exited else None

    @property
    def reason(self) -> Reason | None:
        """Why it ended: ``"exit"``, ``"signal"`` or ``"oom"``; None as long as :attr:`returncode` is."""
        return reason_of(self._exited) if self._exited else None

    @property
    def signal(self) -> int | None:
        """The signal that ended it; None for another end, and as long as :attr:`returncode` is."""
        return (self._exited.signal or None) if self._exited else None

    async def wait(self) -> int:
        """Wait until it has ended; returns its exit code.

        Raises :class:`AgentRefusedError` when its container is gone, or when 256 others have ended there after it.
        """
        while self._exited is None:
            await self._inspect(wait=True)
        return self._exited.exit_code

    async def poll(self) -> int | None:
        """Its exit code if it has ended, else None. Doesn't wait."""
        if self._exited is None:
            await self._inspect()
        return self.returncode

    async def log(self) -> bytes:
        """The end of what it wrote to stdout and stderr: as many bytes as ``start`` was told to keep."""
        return (await self._inspect()).log

    async def send_signal(self, number: int) -> None:
        """Send a signal to its process group. Nothing happens when it has ended."""
        from pykata.agent.v1 import SignalRequestScope

        await self._signal(check_signal(number), SignalRequestScope.GROUP)

    async def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        await self.send_signal(signals.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL to it and to all its descendants, whatever their group."""
        from pykata.agent.v1 import SignalRequestScope

        await self._signal(signals.SIGKILL, SignalRequestScope.TREE)

    async def _signal(self, number: int, scope: SignalRequestScope) -> None:
        if self._exited is None:
            await ask(self._running, lambda: self._running.agent.signal(*self._identity, number, scope))

    async def _inspect(self, *, wait: bool = False) -> InspectResponse:
        async with self._running.explained():
            known = await self._running.agent.inspect(*self._identity, wait=wait)
        if known.exited is not None:
            self._exited = known.exited
        return known
