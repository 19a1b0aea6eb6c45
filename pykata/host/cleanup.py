"""Clean-up that runs to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

import anyio

log = logging.getLogger(__name__)
T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run clean-up to its end: neither a cancel scope nor ``Task.cancel`` (however often) interrupts it.

    A shielded scope alone holds off anyio's cancellation, but not asyncio's own. What was held off is raised
    afterwards.
    """
    task = asyncio.ensure_future(work)
    held: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as exc:
                held = exc
    if held is not None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.error("clean-up failed", exc_info=failure)
        raise held
    return task.result()
