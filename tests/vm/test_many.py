"""Many sandboxes: at once, in a row, on a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import anyio
import pytest

from pykata import Sandbox
from pykata.concurrency import boot_slots

BUSYBOX = "builtin:busybox"
CORES = len(os.sched_getaffinity(0))
GUARD = 300.0
"""Seconds in which a sandbox boots and runs a command, also on a busy machine; one that hangs takes for ever."""


@pytest.fixture
def busy() -> Iterator[None]:
    """Each core has something else to do."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CORES)]
    try:
        yield
        assert all(spinner.poll() is None for spinner in spinners), "the cores weren't kept busy"
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


async def boots(count: int) -> None:
    """Boots, one after the other: nothing goes on from a template."""
    for number in range(count):
        with anyio.fail_after(GUARD):
            async with Sandbox(isolation="emulated", template="off") as sandbox:
                assert sandbox.timings.start == "boot"
                done = await sandbox.run(BUSYBOX, ["echo", str(number)])
                assert done.stdout == f"{number}\n", f"boot {number}: {done}"


async def twenty() -> list[tuple[float, float]]:
    """When each of twenty sandboxes got its slot and was ready, in the order they were entered; they run together."""
    timings: dict[int, tuple[float, float]] = {}
    up = anyio.Event()

    async def use(number: int) -> None:
        async with Sandbox(isolation="emulated", memory="128M", boot_timeout=GUARD) as sandbox:
            done = await sandbox.run(BUSYBOX, ["sh", "-c", f"echo {number}; hostname"], timeout=GUARD)
            assert done.stdout == f"{number}\n{sandbox.options.hostname}\n"
            entered, found = sandbox._open.entered, sandbox.timings
            assert found.slot is not None
            assert found.ready is not None
            timings[number] = entered + found.slot, entered + found.ready
            if len(timings) == 20:
                up.set()
            await up.wait()     # none is left before the last one is up
            done = await sandbox.run(BUSYBOX, ["echo", "still here"], timeout=GUARD)
            assert done.stdout == "still here\n"

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(use, number)
    return [timings[number] for number in range(20)]


async def test_twenty_at_once(bundle: object) -> None:
    timings = await twenty()
    for slot, _ in timings:
        booting = sum(1 for other, ready in timings if other <= slot < ready)
        # One gives its slot back a moment before it is noted as ready.
        assert booting <= 3 * CORES, "no more boot at a time than there are cores"
    assert boot_slots().borrowed_tokens == 0


@pytest.mark.usefixtures("busy")
async def test_boots_in_a_row_on_busy_cores(bundle: object) -> None:
    await boots(10)


@pytest.mark.slow
@pytest.mark.usefixtures("busy")
async def test_two_hundred_boots_in_a_row_on_busy_cores(bundle: object) -> None:
    await boots(200)


@pytest.mark.slow
async def test_two_hundred_boots_several_at_once(bundle: object) -> None:
    async def some() -> None:
        await boots(40)

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(some)
