"""Small pieces of structured concurrency that anyio doesn't have in the shape we need."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import anyio
from anyio.lowlevel import RunVar

from pykata.host import finish


@asynccontextmanager
async def alongside(work: Coroutine[object, object, object]) -> AsyncIterator[None]:
    """Run ``work`` while the body runs; it is cancelled when the body ends, and its failure is raised then.

    A task group would wrap the body's own errors in an ExceptionGroup, which no caller expects of ``run``.
    """
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await finish(_settled(task))
        # Asked for in any case: asyncio complains on stderr of a failure that nobody has looked at.
        failure = None if task.cancelled() else task.exception()
    if failure is not None:
        raise failure


async def _settled(task: asyncio.Task[object]) -> None:
    await asyncio.wait([task])


_boot_slots: RunVar[anyio.CapacityLimiter] = RunVar("pykata_boot_slots")


def boot_slots() -> anyio.CapacityLimiter:
    """First come, first served turns to boot, as many as there are cores.

    More boots than cores at a time make each other late, up to none of them getting anywhere.
    """
    try:
        return _boot_slots.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(len(os.sched_getaffinity(0)))
        _boot_slots.set(limiter)
        return limiter
