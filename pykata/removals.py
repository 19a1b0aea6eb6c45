"""Containers whose command has ended, on their way out of the guest while nobody waits for that.

What a command has written, and how it ended, is known before its container is taken down, which under emulation may
take as long as the command did. So who ran it isn't kept waiting. Whoever needs what the container still has (memory, a
disk slot) waits, and so does who looks at the guest as a whole. A sandbox that is left takes everything with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
from attrs import define, field

from pykata.concurrency import ended
from pykata.errors import SandboxClosedError, VMDiedError
from pykata.host import finish
from pykata.running import Running

log = logging.getLogger(__name__)

LINGER = 0.05
"""Seconds that one stays if nobody needs what it has: the sandbox is often left meanwhile, and that takes it along."""


@define(eq=False)
class Removals:
    """Those of one sandbox that are under way."""

    _tasks: set[asyncio.Task[None]] = field(factory=set)
    _needed: anyio.Event = field(factory=anyio.Event)

    def begin(self, stack: AsyncExitStack) -> None:
        """Leave what is on the ``stack``, which is nobody else's any more."""
        task = asyncio.create_task(_left(stack, self._needed), name="pykata removal")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def done(self) -> None:
        """Wait for those that have begun, which linger no more."""
        if self._tasks:
            self._needed.set()
            self._needed = anyio.Event()
            await asyncio.wait(self._tasks.copy())

    async def give_up(self) -> None:
        """Leave it all as it is: the guest is gone."""
        await ended(*self._tasks)


async def _left(stack: AsyncExitStack, needed: anyio.Event) -> None:
    try:
        async with stack:
            with anyio.move_on_after(LINGER):
                await needed.wait()
    except (VMDiedError, SandboxClosedError) as error:      # of which whatever is called next tells
        log.debug("a container wasn't taken down: %s", error)
    except Exception as error:      # nobody else hears of it, but that a guest which can't do it is broken
        log.error("a container wasn't taken down: %s", error, exc_info=error)


@asynccontextmanager
async def in_background(running: Running) -> AsyncIterator[None]:
    """Nobody waits for the removal of containers while the block runs. To be left when the machine has been ended."""
    running.removals = removals = Removals()
    try:
        yield
    finally:
        running.removals = None
        await finish(removals.give_up())
