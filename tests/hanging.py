"""Ends a test that hangs, and says where each of its tasks waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator

import anyio


class HangError(Exception):
    """The test didn't end in time. The message has the await chain of each task."""


async def limited(work: Awaitable[None], seconds: float) -> None:
    """Await ``work``, for at most this long."""
    where = ""
    with anyio.CancelScope() as scope:

        def over() -> None:
            nonlocal where
            where = "\n".join(waiting())
            scope.cancel()

        timer = asyncio.get_running_loop().call_later(seconds, over)
        try:
            await work
        finally:
            timer.cancel()
    if scope.cancelled_caught:
        raise HangError(f"it took more than {seconds:g} s:\n{where}")


def waiting() -> Iterator[str]:
    """Where each task of the running loop waits: the chain of its awaits, outermost first."""
    for task in asyncio.all_tasks():
        yield f"task {task.get_name()}:"
        yield from (f"  {line}" for line in chain(task.get_coro()))


def chain(step: object) -> Iterator[str]:
    """The lines in which a coroutine waits for the next one. CPython's names: cr_, ag_ and gi_, by its kind."""
    while step is not None:
        kind = next((kind for kind in ("cr", "ag", "gi") if hasattr(step, f"{kind}_frame")), None)
        if kind is None:
            # An anext() of an async generator shows no frame; whatever it is, its name helps.
            yield repr(step)
            return
        if (frame := getattr(step, f"{kind}_frame")) is not None:
            yield f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}"
        step = getattr(step, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
