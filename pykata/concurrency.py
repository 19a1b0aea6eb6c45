"""Small pieces of structured concurrency that anyio doesn't have in the shape we need."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import anyio
from anyio.lowlevel import RunVar

from pykata.host import finish

SWALLOWED = 0.1
"""Seconds after which work that goes on in spite of its cancellation is cancelled again."""


@asynccontextmanager
async def alongside(work: Coroutine[object, object, object]) -> AsyncIterator[None]:
    """Run ``work`` while the body runs; it is cancelled when the body ends, and its failure is raised then.

    A task group would wrap the body's own errors in an ExceptionGroup, which no caller expects of ``run``.
    """
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        await finish(_cancelled(task))
        # Asked for in any case: asyncio complains on stderr of a failure that nobody has looked at.
        failure = None if task.cancelled() else task.exception()
    if failure is not None:
        raise failure


async def together(work: Coroutine[object, object, object], beside: Coroutine[object, object, object]) -> None:
    """Run both to their end, at the same time. One that fails has the other cancelled, and its failure is raised."""
    ended = anyio.Event()

    async def run() -> None:
        try:
            await beside
        finally:
            ended.set()

    async with alongside(run()):
        await work
        await ended.wait()


async def _cancelled(task: asyncio.Task[object]) -> None:
    # More than once: an anyio scope in the work takes a cancellation that comes while it is cancelled itself for its
    # own, and swallows it.
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=SWALLOWED)


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
