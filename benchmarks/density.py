"""Many sandboxes of one template alive at once: what they take of the host, and what of it is this program's own.

Each answers a command. The CPU's idle share is that of the whole machine, so it says something only if nothing else
runs on it. What the sandboxes themselves use of it, this program included, is below: that doesn't depend on the load.
Memory is what the host has less than before (MemAvailable), which counts all: the machines, the template, this program,
the kernel's own. They keep little translated code, as in docs/guides/density.md.
"""

from __future__ import annotations

import os
import time
from contextlib import AsyncExitStack
from pathlib import Path

import anyio

import pykata
from benchmarks._table import Row, main, row
from benchmarks.memory import pss
from pykata.hypervisors.qemu import QEMU

IMAGE = "builtin:busybox"
IDLE = 20.0
"""Seconds that idling is watched."""
SETTLING = 5.0
"""Seconds between the last command and that."""
HYPERVISOR = QEMU(accel="tcg", agent="serial", code_cache=5)


def available() -> float:
    """MemAvailable, MiB."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) / 1024


def own_memory() -> float:
    """What this program has for itself, MiB."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(text.partition(f"Private_{kind}:")[2].split()[0]) for kind in ("Clean", "Dirty")) / 1024


def machine_ticks() -> tuple[int, int]:
    """Idle time and all time of the whole machine (proc_stat(5))."""
    times = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return times[3] + times[4], sum(times)


def used(pid: int) -> float:
    """Seconds that the threads of a process have used of the CPUs (sched-stats.rst); ticks are too coarse for that."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


async def started(stack: AsyncExitStack, template: pykata.Template, count: int) -> list[pykata.Sandbox]:
    """So many sandboxes, which are left with the ``stack``; two are on their way at a time."""
    sandboxes = [template.sandbox() for _ in range(count)]
    limit = anyio.CapacityLimiter(len(os.sched_getaffinity(0)))

    async def start(sandbox: pykata.Sandbox) -> None:
        async with limit:
            await stack.enter_async_context(sandbox)

    async with anyio.create_task_group() as group:
        for sandbox in sandboxes:
            group.start_soon(start, sandbox)
    return sandboxes


async def answers(sandboxes: list[pykata.Sandbox]) -> int:
    """How many execute a command and say what it wrote, a few at a time."""
    limit = anyio.CapacityLimiter(len(os.sched_getaffinity(0)))
    good = 0

    async def ask(number: int, sandbox: pykata.Sandbox) -> None:
        nonlocal good
        async with limit:
            done = await sandbox.run(IMAGE, ["echo", str(number)], check=True)
            good += done.stdout == f"{number}\n"

    async with anyio.create_task_group() as group:
        for number, sandbox in enumerate(sandboxes):
            group.start_soon(ask, number, sandbox)
    return good


async def idling(pids: list[int]) -> tuple[float, float]:
    """Shares of the CPUs, in percent: what is idle of the machine, and what these processes and this program use."""
    await anyio.sleep(SETTLING)
    pids = [*pids, os.getpid()]
    idle, all_of_it, theirs, began = *machine_ticks(), sum(map(used, pids)), time.monotonic()
    await anyio.sleep(IDLE)
    idle_then, all_then, theirs_then, ended = *machine_ticks(), sum(map(used, pids)), time.monotonic()
    cores = len(os.sched_getaffinity(0))
    return 100 * (idle_then - idle) / (all_then - all_of_it), 100 * (theirs_then - theirs) / (ended - began) / cores


async def measure(count: int) -> list[Row]:
    """Rows for what so many take."""
    rows, before = [], available()
    async with AsyncExitStack() as stack:
        made = pykata.Template(IMAGE, isolation="emulated", setup=[["echo", "warm"]], hypervisor=HYPERVISOR, spares=0)
        template = await stack.enter_async_context(made)
        first = await stack.enter_async_context(template.sandbox())
        await answers([first])      # what is imported and allocated once is there by now
        own = own_memory()
        sandboxes = await started(stack, template, count)
        pids = [sandbox._open.vm.pid for sandbox in sandboxes]
        rows.append(row("this program's own, for each", "KiB", [(own_memory() - own) * 1024 / count]))
        await anyio.sleep(SETTLING)
        rows.append(row("PSS of QEMU, idle", "MiB", [pss(pid) for pid in pids]))
        rows.append(row("memory of the host, all together", "MiB", [before - available()]))
        rows.append(row("sandboxes that answered a command", "", [await answers(sandboxes)]))
        idle, theirs = await idling(pids)
        rows.append(row("  PSS after it", "MiB", [pss(pid) for pid in pids]))
        rows.append(row("  memory of the host, all together", "MiB", [before - available()]))
        rows.append(row("idle CPU of the machine", "%", [idle]))
        rows.append(row("  used by all sandboxes", "%", [theirs]))
    return rows


if __name__ == "__main__":
    main(measure, rounds=200, about=__doc__)
