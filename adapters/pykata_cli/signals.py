"""What becomes of the signals that pykata gets: once the command in the guest runs they are its own, before ours."""

from __future__ import annotations

import argparse
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
from attrs import define

from pykata import Process, PykataError
from pykata_cli import exits

RELAYED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT,
)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@define
class Relay:
    """Passes signals on to the command. Before it runs, a signal that ends programs ends us, by way of ``scope``.

    The first Ctrl-C is the command's, the second kills it, and the third no longer waits for that.
    """

    scope: anyio.CancelScope
    process: Process | None = None
    ended_by: int = 0
    _interrupts: int = 0

    async def serve(self, signals: AsyncIterator[signal.Signals]) -> None:
        """Pass on what comes, for as long as it isn't cancelled."""
        async with anyio.create_task_group() as tasks:
            async for number in signals:
                # Each in a task of its own: a guest that doesn't answer must not hold up the next Ctrl-C.
                tasks.start_soon(self._take, number)

    async def _take(self, number: signal.Signals) -> None:
        self._interrupts += number == signal.SIGINT
        if self.process is None or self._interrupts > 2:
            if number in _ENDING:
                self.ended_by = number
                self.scope.cancel()
            return
        try:
            if self._interrupts == 2:
                await self.process.kill()
            else:
                await self.process.send_signal(number)
        except PykataError:
            pass                # whoever reads the command's output hears of it too, and says it


async def relayed(work: Callable[[argparse.Namespace, Relay], Awaitable[int]], arguments: argparse.Namespace) -> int:
    """Do the work of a command that takes signals; returns its exit code, or that of the signal that ended us."""
    # The receiver outlives the sandbox: an impatient Ctrl-C must not interrupt the clean-up.
    with anyio.open_signal_receiver(*RELAYED) as signals:
        async with anyio.create_task_group() as tasks:
            relay = Relay(tasks.cancel_scope)
            tasks.start_soon(relay.serve, signals)
            code = await work(arguments, relay)
            tasks.cancel_scope.cancel()
    return exits.SIGNAL + relay.ended_by if relay.ended_by else code
