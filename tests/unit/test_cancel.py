"""Cancellation at every await of boot, run and exit, over fakes: nothing is left, and nothing is swallowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.to_thread
import pytest

from pykata import Sandbox
from pykata.concurrency import boot_slots
from pykata.host import run_root
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess
from tests import leaks
from tests.cancellation import Way, cancel_everywhere
from tests.conftest import PLACES
from tests.settling import settled

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"


async def talks(process: FakeProcess) -> int:
    for number in range(3):
        await process.write(b"%d" % number)
        await process.write_error(b"%d" % number)
    while data := await process.read():
        await process.write(data)
    return 0


@pytest.fixture
def hypervisor() -> FakeHypervisor:
    return FakeHypervisor(commands={"talks": talks})


Work = Callable[[Sandbox], Coroutine[Any, Any, object]]


async def nothing(sandbox: Sandbox) -> None:
    """Boot and exit."""


async def run(sandbox: Sandbox) -> None:
    done = await sandbox.run(BUSYBOX, ["talks"], input=b"x" * 100_000)
    assert done.stdout_bytes == b"012" + b"x" * 100_000


async def run_with_callbacks(sandbox: Sandbox) -> None:
    async def heard(data: bytes) -> None:
        await anyio.lowlevel.checkpoint()

    assert (await sandbox.run(BUSYBOX, ["talks"], on_stdout=heard, on_stderr=heard, timeout=60)).ok


async def run_into_a_timeout(sandbox: Sandbox) -> None:
    assert (await sandbox.run(BUSYBOX, ["sleep", "infinity"], timeout=1e-3)).reason == "timeout"


async def container(sandbox: Sandbox) -> None:
    async with sandbox.container(BUSYBOX) as kept:
        assert (await kept.run(["talks"], input="hi")).ok
        assert (await kept.run(["false"])).exit_code == 1


async def process(sandbox: Sandbox) -> None:
    async with sandbox.process(BUSYBOX, ["talks"]) as running:
        await running.stdin.send(b"hello")
        assert await anext(running.stdout) == b"0"
        await running.terminate()
        await running.wait()


async def process_left_early(sandbox: Sandbox) -> None:
    async with sandbox.process(BUSYBOX, ["yes"]) as running:
        await anext(running.stdout)


async def several_at_once(sandbox: Sandbox) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(run, sandbox)


class Left:
    """Checks after each cancellation that nothing is left of it."""

    def __init__(self, hypervisor: FakeHypervisor) -> None:
        self._before = leaks.snapshot(PLACES)
        self._tasks = asyncio.all_tasks()
        self._machines = hypervisor.machines
        self.checked = 0

    async def __call__(self, n: int, way: Way) -> None:
        where = f"cancelled at suspension {n} ({way})"
        # A cancelled task needs a turn of the loop for each of its awaits to be over.
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        assert leaks.other_tasks(self._tasks) == [], where
        assert list(run_root().glob("[!.]*")) == [], where
        assert boot_slots().borrowed_tokens == 0, where
        assert all(machine.plugged == {} for machine in self._machines), where
        self._machines.clear()
        self.checked += 1
        if n % 10 == 1:     # descriptors, processes, threads, mounts: slow to look at, and they accumulate
            # In a thread: it may wait, which must not hold up the loop.
            assert await anyio.to_thread.run_sync(leaks.left, self._before, PLACES) == [], where


@pytest.mark.parametrize(
    "work",
    [nothing, run, run_with_callbacks, run_into_a_timeout, container, process, process_left_early, several_at_once],
)
async def test_cancelled_anywhere_nothing_is_left(hypervisor: FakeHypervisor, work: Work) -> None:
    async def session() -> None:
        async with Sandbox(hypervisor, FakeFs()) as sandbox:
            await work(sandbox)

    await session()     # once, so that caches and lazy imports are filled
    hypervisor.machines.clear()
    left = Left(hypervisor)
    most = await cancel_everywhere(session, left)
    assert most > 5
    assert left.checked > most


@pytest.mark.parametrize("work", [run, container, process, process_left_early])
async def test_a_sandbox_survives_what_is_cancelled_in_it(hypervisor: FakeHypervisor, work: Work) -> None:
    async with Sandbox(hypervisor, FakeFs()) as sandbox:
        (machine,) = hypervisor.machines
        await work(sandbox)

        async def usable(n: int, way: Way) -> None:
            where = f"cancelled at suspension {n} ({way})"
            await sandbox._open.settled()
            async with sandbox._open.making:        # the one that waits for the next run is whole, or isn't there
                assert set(machine.agent.containers) == {one.id for one in sandbox._open.containers.values()}, where
                assert len(sandbox._open.containers) <= len(machine.plugged) <= 1, where
            assert (await sandbox.run(BUSYBOX, ["echo", "usable"])).stdout == "usable\n", where

        assert await cancel_everywhere(lambda: work(sandbox), usable) > 5


# --- the ways that people cancel ---


async def session(hypervisor: FakeHypervisor, started: asyncio.Event) -> None:
    async with Sandbox(hypervisor, FakeFs()) as sandbox:
        started.set()
        await sandbox.run(BUSYBOX, ["sleep", "infinity"])


async def test_asyncio_timeout(hypervisor: FakeHypervisor) -> None:
    async def limited() -> None:
        async with asyncio.timeout(0.05):
            await session(hypervisor, asyncio.Event())

    with pytest.raises(TimeoutError):
        await limited()


async def test_wait_for(hypervisor: FakeHypervisor) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(session(hypervisor, asyncio.Event()), 0.05)


async def test_a_task_group_whose_other_task_fails(hypervisor: FakeHypervisor) -> None:
    started = asyncio.Event()

    async def fail() -> None:
        await started.wait()
        raise KeyError("mine")

    async def together() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(session(hypervisor, started))
            group.create_task(fail())

    with pytest.raises(ExceptionGroup) as caught:
        await together()
    assert caught.group_contains(KeyError)
    assert len(caught.value.exceptions) == 1, "the cancelled session added no error of its own"


async def test_an_anyio_scope(hypervisor: FakeHypervisor) -> None:
    with anyio.move_on_after(0.05) as scope:
        await session(hypervisor, asyncio.Event())
    assert scope.cancelled_caught


async def test_an_anyio_task_group(hypervisor: FakeHypervisor) -> None:
    started = asyncio.Event()
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(session, hypervisor, started)
        await started.wait()
        group.cancel_scope.cancel()
    assert all(machine.plugged == {} for machine in hypervisor.machines)


async def test_cancelled_again_and_again(hypervisor: FakeHypervisor) -> None:
    # An impatient Ctrl-C: each turn of the loop another cancellation, through all of the clean-up.
    started = asyncio.Event()
    task = asyncio.create_task(session(hypervisor, started))
    await started.wait()
    for _ in range(200):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([task])
    assert task.cancelled()


async def test_cancelled_while_it_waits_for_its_turn_to_boot(hypervisor: FakeHypervisor) -> None:
    limiter = boot_slots()
    holders = [object() for _ in range(int(limiter.total_tokens))]
    for holder in holders:
        limiter.acquire_on_behalf_of_nowait(holder)
    task = asyncio.create_task(session(hypervisor, asyncio.Event()))
    await settled()
    assert limiter.statistics().tasks_waiting == 1
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert limiter.statistics().tasks_waiting == 0
    for holder in holders:
        limiter.release_on_behalf_of(holder)
    assert hypervisor.machines == []
