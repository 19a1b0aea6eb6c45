"""Cancels a coroutine at its N-th suspension, for every N, in the two ways that asyncio can.

``Task.cancel`` reaches a task either while what it waits for is still under way, or when that is done already and only
the task's wake-up is due: then the result has arrived, and is lost. Code that acquires something by an ``await`` and
cleans up in the lines after it passes the first and leaks in the second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Literal

from attrs import define

Way = Literal["suspended", "arriving"]
WAYS: tuple[Way, ...] = ("suspended", "arriving")


@define
class CancelAt:
    """Awaits ``work``, and cancels the task at its ``n``-th suspension (from 1 on)."""

    work: Coroutine[Any, Any, object]
    n: int
    way: Way
    fired: bool = False
    suspensions: int = 0

    def __await__(self) -> Generator[Any, Any, object]:
        iterator = self.work.__await__()
        error: BaseException | None = None
        while True:
            try:
                waiting_for = iterator.throw(error) if error else iterator.send(None)
            except StopIteration as done:
                return done.value
            self._suspended(waiting_for)
            error = None
            try:
                yield waiting_for
            except BaseException as thrown:
                error = thrown

    def _suspended(self, waiting_for: object) -> None:
        self.suspensions += 1
        if self.suspensions != self.n:
            return
        self.fired = True
        task = asyncio.current_task()
        assert task is not None
        if self.way == "arriving" and isinstance(waiting_for, asyncio.Future):
            # Added before the task's own callback, hence called before it: the task is cancelled with the result there.
            waiting_for.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()


async def cancel_everywhere(
    work: Callable[[], Coroutine[Any, Any, object]],
    afterwards: Callable[[int, Way], Awaitable[None]],
    *,
    ways: tuple[Way, ...] = WAYS,
    first: int = 1,
    step: int = 1,
) -> int:
    """Run ``work`` once for each suspension and way, cancelled there; ``afterwards`` checks what is left.

    Returns how many suspensions there were. A run that swallows its cancellation is an error, unless the cancellation
    came when the work was as good as done.
    """
    most = 0
    for way in ways:
        n = first
        while True:
            cancelling = CancelAt(work(), n, way)
            task = asyncio.ensure_future(_awaited(cancelling))
            await asyncio.wait([task])
            if not cancelling.fired:
                task.result()       # ran to its end uncancelled: every suspension has had its turn
                break
            assert task.cancelled(), f"cancelled at suspension {n} ({way}), but it ended with {task!r}"
            await afterwards(n, way)
            most = max(most, n)
            n += step
    return most


async def _awaited(awaitable: Awaitable[object]) -> object:
    return await awaitable
