"""Small pieces of structured concurrency that anyio doesn't have in the shape we need."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

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
        failures = await finish(ended(task))
    for failure in failures:
        raise failure


async def together(work: Coroutine[object, object, object], beside: Coroutine[object, object, object]) -> None:
    """Run both to their end, at the same time. One that fails has the other cancelled, and its failure is raised."""
    both = [asyncio.create_task(work), asyncio.create_task(beside)]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        # What failed first says why; the other may fail because it was cancelled.
        failures = await finish(ended(*sorted(both, key=lambda task: not task.done())))
    for failure in failures:
        raise failure
    for task in both:
        task.result()       # of one that has cancelled itself


async def ended(*tasks: asyncio.Task[Any]) -> list[BaseException]:
    """Cancel what isn't done; returns the failures: asyncio complains of one that nobody looks at."""
    # More than once: an anyio scope in the work takes a cancellation that comes while it is cancelled itself for its
    # own, and swallows it.
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=SWALLOWED)
    failures = (None if task.cancelled() else task.exception() for task in tasks)
    return [failure for failure in failures if failure is not None]


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
