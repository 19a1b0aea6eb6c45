"""Waits until nothing goes on in the running loop any more."""

from __future__ import annotations

import asyncio

import anyio

QUIET = 100
"""Turns of the loop in a row: in each of them it looks what has come to its sockets."""


async def settled() -> None:
    """Wait until every other task waits for something that none of them is going to do.

    :func:`anyio.wait_all_tasks_blocked` looks once: on a slow machine, what one task has sent to another by a socket
    may be on its way then.
    """
    quiet = 0
    while quiet < QUIET:
        await anyio.lowlevel.checkpoint()
        quiet = 0 if any(map(_is_ready, asyncio.all_tasks() - {asyncio.current_task()})) else quiet + 1


def _is_ready(task: asyncio.Task[object] | None) -> bool:
    waits_for = getattr(task, "_fut_waiter", None)
    return waits_for is None or waits_for.done()
