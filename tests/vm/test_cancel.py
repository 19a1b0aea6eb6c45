"""Cancellation at every await of boot, run and exit, with a real virtual machine: nothing is left of it.

There are about 40, each reached by a boot of its own, twice. All of them take minutes on a busy machine and are marked
slow; the default run takes every fourth, in one way the odd ones between those of the other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.to_thread
import pytest

from pykata import Sandbox
from pykata.concurrency import boot_slots
from pykata.host import run_root
from pykata.spec import TemplatePolicy
from tests import leaks
from tests.cancellation import WAYS, Way, cancel_everywhere
from tests.conftest import PLACES

log = logging.getLogger(__name__)

BUSYBOX = "builtin:busybox"

Work = Callable[[Sandbox], Coroutine[Any, Any, object]]


async def run(sandbox: Sandbox) -> None:
    done = await sandbox.run(BUSYBOX, ["cat"], input=b"x" * 100_000)
    assert len(done.stdout_bytes) == 100_000


async def several_commands(sandbox: Sandbox) -> None:
    async with sandbox.container(BUSYBOX) as container:
        assert (await container.run(["echo", "hi"])).ok
        async with container.process(["cat"]) as process:
            await process.stdin.send(b"hello")
            assert await anext(process.stdout) == b"hello"


class Left:
    """Checks after each cancellation that nothing is left of it."""

    def __init__(self) -> None:
        self._before = leaks.snapshot(PLACES)
        self._tasks = asyncio.all_tasks()
        self.cancelled: list[tuple[Way, int]] = []

    async def __call__(self, n: int, way: Way) -> None:
        where = f"cancelled at suspension {n} ({way})"
        self.cancelled.append((way, n))
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        assert leaks.other_tasks(self._tasks) == [], where
        assert list(run_root().glob("[!.]*")) == [], where
        assert boot_slots().borrowed_tokens == 0, where
        # In a thread: it may wait, which must not hold up the loop.
        assert await anyio.to_thread.run_sync(leaks.left, self._before, PLACES) == [], where


async def session(work: Work, template: TemplatePolicy = "auto") -> None:
    async with Sandbox(isolation="emulated", template=template) as sandbox:
        await work(sandbox)


async def everything(sandbox: Sandbox) -> None:
    await run(sandbox)
    await several_commands(sandbox)


async def cancelled(
    template: TemplatePolicy, *, first: int, step: int, ways: tuple[Way, ...] = WAYS
) -> list[tuple[Way, int]]:
    """Where it was cancelled; nothing was left of any."""
    await session(everything, template)     # once, so that caches and lazy imports are filled
    left = Left()
    most = await cancel_everywhere(lambda: session(everything, template), left, ways=ways, first=first, step=step)
    log.info("%d cancellations at up to %d awaits", len(left.cancelled), most)
    assert most > 30
    return left.cancelled


@pytest.mark.parametrize("template", ["auto", "off"])
@pytest.mark.parametrize(("way", "first"), [("suspended", 1), ("arriving", 3)])
async def test_cancelled_at_every_fourth_await_nothing_is_left(
    bundle: object, way: Way, first: int, template: TemplatePolicy
) -> None:
    assert len(await cancelled(template, first=first, step=4, ways=(way,))) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("template", ["auto", "off"])
async def test_cancelled_at_every_await_nothing_is_left(bundle: object, template: TemplatePolicy) -> None:
    where = await cancelled(template, first=1, step=1)
    for way in WAYS:
        numbers = [n for found, n in where if found == way]
        assert numbers == list(range(1, len(numbers) + 1))


async def test_a_sandbox_survives_what_is_cancelled_in_it(sb: Sandbox) -> None:
    async def usable(n: int, way: Way) -> None:
        running = sb._running
        assert running is not None
        assert running.broken is None, f"cancelled at suspension {n} ({way}): {sb.console}"
        assert (await sb.stats()).containers == {}, f"cancelled at suspension {n} ({way})"

    assert await cancel_everywhere(lambda: several_commands(sb), usable) >= 8
    assert await cancel_everywhere(lambda: run(sb), usable) >= 8
    assert (await sb.run(BUSYBOX, ["echo", "usable"])).stdout == "usable\n"


# --- the ways that people cancel, at moments that nobody chose ---


@pytest.mark.parametrize("seconds", [0.01, 0.3, 1.0, 3.0])
async def test_asyncio_timeout(bundle: object, seconds: float) -> None:
    async def limited() -> None:
        async with asyncio.timeout(seconds), Sandbox(isolation="emulated") as sandbox:
            await sandbox.run(BUSYBOX, ["sleep", "1000"])

    with pytest.raises(TimeoutError):
        await limited()


@pytest.mark.parametrize("seconds", [0.1, 2.0])
async def test_an_anyio_scope(bundle: object, seconds: float) -> None:
    with anyio.move_on_after(seconds) as scope:
        async with Sandbox(isolation="emulated") as sandbox:
            await sandbox.run(BUSYBOX, ["sleep", "1000"])
    assert scope.cancelled_caught


async def test_a_task_group_whose_other_task_fails(bundle: object) -> None:
    started = asyncio.Event()

    async def use() -> None:
        async with Sandbox(isolation="emulated") as sandbox, sandbox.process(BUSYBOX, ["sleep", "1000"]):
            started.set()
            await anyio.sleep_forever()

    async def fail() -> None:
        await started.wait()
        raise KeyError("mine")

    async def together() -> None:
        async with asyncio.TaskGroup() as group:
            for task in (use(), use(), fail()):
                group.create_task(task)

    with pytest.raises(ExceptionGroup) as caught:
        await together()
    assert len(caught.value.exceptions) == 1
    assert caught.group_contains(KeyError)


async def test_an_impatient_interrupt(bundle: object) -> None:
    # Cancelled at each turn of the loop, all through the clean-up.
    async def use(started: asyncio.Event) -> None:
        async with Sandbox(isolation="emulated") as sandbox, sandbox.container(BUSYBOX) as container:
            started.set()
            await container.run(["sleep", "1000"])

    started = asyncio.Event()
    task = asyncio.create_task(use(started))
    await started.wait()
    for _ in itertools.takewhile(lambda _: not task.done(), itertools.count()):
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
