"""Work alongside a body, and turns to boot."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from typing import Any

import anyio
import pytest

from pykata.concurrency import alongside, boot_slots, together
from tests.cancellation import cancel_everywhere
from tests.settling import settled


async def forever(log: list[str]) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        log.append("ended")


async def failing() -> None:
    raise OSError("the work failed")


async def test_both_run_at_once_and_are_waited_for() -> None:
    first, second = anyio.Event(), anyio.Event()

    async def work(mine: anyio.Event, other: anyio.Event) -> None:
        mine.set()
        await other.wait()

    await together(work(first, second), work(second, first))


@pytest.mark.parametrize("fails_beside", [False, True])
async def test_the_failure_of_one_of_both_is_raised(fails_beside: bool) -> None:
    log: list[str] = []

    async def short() -> None:
        log.append("short")

    works = (short(), failing()) if fails_beside else (failing(), forever(log))
    with pytest.raises(OSError, match="the work failed"):
        await together(*works)
    assert log in (["short"], ["ended"], [])        # what was never begun has nothing to end


@pytest.mark.parametrize("fails_beside", [False, True])
async def test_the_failure_of_one_of_both_cancels_the_other(fails_beside: bool) -> None:
    log: list[str] = []
    begun = anyio.Event()

    async def other() -> None:
        begun.set()
        await forever(log)

    async def fails() -> None:
        await begun.wait()
        await failing()

    with anyio.fail_after(300), pytest.raises(OSError, match="the work failed"):
        await together(*((other(), fails()) if fails_beside else (fails(), other())))
    assert log == ["ended"]


async def test_the_first_failure_is_raised_and_the_one_that_follows_from_it_is_not() -> None:
    async def fails_too() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise KeyError("it was cancelled")

    with anyio.fail_after(300), pytest.raises(OSError, match="the work failed"):
        await together(fails_too(), failing())


async def test_both_are_cancelled_from_outside() -> None:
    log: list[str] = []

    async def work() -> None:
        await anyio.lowlevel.checkpoint()
        await forever(log)

    both = asyncio.create_task(together(work(), work()))
    await settled()
    both.cancel()
    await asyncio.wait([both])
    assert both.cancelled()
    assert log == ["ended"] * 2


async def test_work_is_cancelled_when_the_body_ends() -> None:
    log: list[str] = []
    async with alongside(forever(log)):
        await anyio.lowlevel.checkpoint()
        assert log == []
    assert log == ["ended"]


async def test_work_that_is_done_is_left_alone() -> None:
    done = anyio.Event()

    async def work() -> None:
        done.set()

    async with alongside(work()):
        await done.wait()


async def test_a_failure_of_the_work_is_raised_at_the_end() -> None:
    reached: list[str] = []

    async def body() -> None:
        async with alongside(failing()):
            await anyio.lowlevel.checkpoint()
            reached.append("the end")

    with pytest.raises(OSError, match="the work failed"):
        await body()
    assert reached == ["the end"]


async def test_the_body_s_error_comes_before_that_of_the_work() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    async def body() -> None:
        async with alongside(failing()):
            await anyio.lowlevel.checkpoint()
            raise KeyError("the body failed")

    with pytest.raises(KeyError):
        await body()
    gc.collect()
    await anyio.lowlevel.checkpoint()
    assert complaints == [], "asyncio says that an exception was never retrieved"


async def test_clean_up_of_the_work_is_awaited_even_when_cancelled() -> None:
    log: list[str] = []

    async def slow_to_end() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            log.append("cleaned up")

    async def body() -> None:
        async with alongside(slow_to_end()):
            await anyio.lowlevel.checkpoint()

    async def afterwards(n: int, way: str) -> None:
        # At the first suspension the work may not have begun: then it has nothing to clean up.
        assert log == ["cleaned up"] or n == 1
        log.clear()

    assert await cancel_everywhere(body, afterwards) >= 2


async def test_boots_take_turns_in_the_order_they_came() -> None:
    cores = len(os.sched_getaffinity(0))
    order: list[int] = []
    most = now = 0
    release = anyio.Event()

    async def boot(number: int) -> None:
        nonlocal most, now
        async with boot_slots():
            order.append(number)
            now += 1
            most = max(most, now)
            await release.wait()
            await anyio.lowlevel.checkpoint()
            now -= 1

    async with anyio.create_task_group() as group:
        for number in range(4 * cores):
            group.start_soon(boot, number)
        await settled()
        assert order == list(range(cores)), "more than the cores can take at once"
        release.set()
    assert order == list(range(4 * cores))
    assert most == cores


async def test_a_cancelled_boot_gives_its_turn_to_the_next() -> None:
    async def boot() -> None:
        async with boot_slots():
            await anyio.lowlevel.checkpoint()

    async def afterwards(n: int, way: str) -> None:
        assert boot_slots().borrowed_tokens == 0

    for holders in (0, len(os.sched_getaffinity(0))):
        async with anyio.create_task_group() as group:
            release = anyio.Event()

            async def hold(release: anyio.Event = release) -> None:
                async with boot_slots():
                    await release.wait()

            for _ in range(holders):
                group.start_soon(hold)
            await settled()
            waiter = asyncio.create_task(boot())
            await settled()
            waiter.cancel()
            release.set()
            await asyncio.wait([waiter])
        assert boot_slots().borrowed_tokens == 0
    assert await cancel_everywhere(boot, afterwards) >= 2


def test_each_event_loop_has_turns_of_its_own() -> None:
    # A limiter holds futures of its loop: one that another loop has left behind would never wake anybody.
    seen: list[anyio.CapacityLimiter] = []

    async def look() -> None:
        async with boot_slots():
            seen.append(boot_slots())

    anyio.run(look)
    anyio.run(look)
    thread = threading.Thread(target=anyio.run, args=(look,))
    thread.start()
    thread.join()
    assert len({id(limiter) for limiter in seen}) == 3
    assert all(limiter.borrowed_tokens == 0 for limiter in seen)


async def test_work_that_swallows_its_cancellation_is_cancelled_again() -> None:
    async def deaf_once() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await anyio.sleep_forever()
        await anyio.sleep_forever()

    async with alongside(deaf_once()):
        await anyio.lowlevel.checkpoint()
