"""Sandboxes that go on from a template, beside a bare QEMU that goes on from a saved machine of the same kind.

The floor is QEMU with the very command line of ``pykata.hypervisors.qemu.command``, the same machine and devices,
going on from a guest whose PID 1 is a shell that sleeps, until that has echoed one line over the port that is the
agent's. The line is there when QEMU starts; in the end QEMU is killed and waited for. It runs as whoever runs this, and
nothing sees to it that it ends with its parent. All are measured in turns.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import anyio
from attrs import evolve

import pykata
from benchmarks._table import Row, interleaved, main, note, quantile, row
from benchmarks.memory import pss
from pykata import first_image
from pykata.hypervisors.base import VM
from pykata.hypervisors.qemu import QEMU
from pykata.hypervisors.qemu.command import Descriptors, command
from pykata.hypervisors.qemu.vm import QemuVM
from pykata.spec import SavedVM, SerialTransport, VMSpec
from tests.vm.qemu_guest import booted, initrd

Start = Callable[[], Awaitable[float]]

IMAGE = "builtin:busybox"
PORTIONS, STARTED = 5, 20
"""Sandboxes that are started one after the other, two at a time, for how many that are in a second. In portions, in
turns with those of the floor, which makes the ratio that of the same moment."""
CHANGED = 100
"""MiB that a sandbox has changed before it is forked."""
ALIVE = 20
"""Sandboxes that are there at once, for what each takes of memory."""


@contextmanager
def restored(hypervisor: QEMU, saved: SavedVM) -> Iterator[tuple[float, int]]:
    """A bare QEMU whose guest has echoed a line: milliseconds from starting it to that, and its pid."""
    with ExitStack() as stack:
        agent, control, state = socket.socketpair(), socket.socketpair(), socket.socketpair()
        for end in (*agent, *control, *state):
            stack.enter_context(end)
        spec = VMSpec(kernel=Path(), initrd=Path(), transport=SerialTransport(host=agent[0], vmm=agent[1]), saved=saved)
        given = Descriptors(
            start=(saved.memory, state[1].fileno()), control=control[1].fileno(), agent=agent[1].fileno()
        )
        argv = command(
            hypervisor._binary(), hypervisor.machine, "tcg", spec, given,
            slots=hypervisor.features.disk_slots, reclaim=hypervisor.reclaim, tsc_khz=None,
        )  # fmt: skip
        agent[0].send(b"echo up\n")
        began = time.perf_counter()
        q = stack.enter_context(
            subprocess.Popen(argv, pass_fds=given.all(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        )
        stack.callback(q.kill)
        state[0].sendall(saved.devices)
        said = b""
        while b"up\n" not in said:
            said += agent[0].recv(100)
        yield (time.perf_counter() - began) * 1000, q.pid


def bare(hypervisor: QEMU, saved: SavedVM) -> float:
    """Milliseconds from starting QEMU to the line that its guest echoes."""
    with restored(hypervisor, saved) as (elapsed, _):
        return elapsed


async def translated(sandbox: pykata.Sandbox) -> float:
    """Blocks of code that QEMU has translated for the guest so far: what most of the time goes into."""
    vm = sandbox._open.vm
    assert isinstance(vm, QemuVM)
    answer = await vm._qmp.execute("x-query-jit")
    found = re.search(r"TB count\s+(\d+)", str(answer))
    assert found
    return float(found[1])


async def first_output(sandbox: pykata.Sandbox, blocks: list[float]) -> float:
    """Milliseconds from entering a sandbox to the first byte of its first command's output."""
    began = time.perf_counter()
    async with sandbox, sandbox.process(IMAGE, ["echo", "up"]) as process:
        await anext(process.stdout)
        elapsed = (time.perf_counter() - began) * 1000
        blocks.append(await translated(sandbox))
        await process.wait()
    return elapsed


async def entered(sandbox: pykata.Sandbox) -> float:
    """Milliseconds until a sandbox is entered: its guest has become one of its own, and its agent has said so."""
    began = time.perf_counter()
    async with sandbox:
        return (time.perf_counter() - began) * 1000


async def with_spare(hypervisor: QEMU, rounds: int, blocks: list[float]) -> list[float]:
    """As first_output, from a template that keeps a machine ready, each time when it is."""
    elapsed = list[float]()
    async with pykata.Template(IMAGE, isolation="emulated", hypervisor=hypervisor) as template:
        assert template._spares
        for _ in range(rounds):
            await template._spares.filled()
            elapsed.append(await first_output(template.sandbox(), blocks))
    return elapsed


async def per_second(start: Start) -> float:
    """How many of :data:`STARTED` are started in a second, as many at a time as there are cores."""
    limit = anyio.CapacityLimiter(len(os.sched_getaffinity(0)))

    async def one() -> None:
        async with limit:
            await start()

    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(STARTED):
            group.start_soon(one)
    return STARTED / (time.perf_counter() - began)


async def rates(floor: Start, enter: Start, with_output: Start) -> list[Row]:
    """Rows for how many can be started in a second. The first portion of each warms up, and doesn't count."""
    ways = [partial(per_second, start) for start in (floor, enter, with_output)]
    best, *ours = [values[1:] for values in await interleaved(PORTIONS + 1, *ways)]
    names = f"entered and left per second, of {PORTIONS * STARTED}", "  with a first output"
    ratios = [quantile([one / most for one, most in zip(each, best, strict=True)], 0.5) for each in ours]
    return [evolve(row(name, "1/s", each, best), ratio=ratio)
            for name, each, ratio in zip(names, ours, ratios, strict=True)]


def watch_pauses(vm: VM, pauses: list[float]) -> None:
    """From now on note how many milliseconds the machine stands still whenever it is made to."""
    pause, resume, began = vm.pause, vm.resume, [0.0]

    async def pausing() -> None:
        began[0] = time.perf_counter()
        await pause()

    async def resuming() -> None:
        await resume()
        pauses.append((time.perf_counter() - began[0]) * 1000)

    vm.pause, vm.resume = pausing, resuming     # type: ignore[method-assign]


async def forked(parent: pykata.Sandbox, container: str, calls: list[float]) -> float:
    """Milliseconds from asking for a fork to the first output of a command in the child.

    Returns when what the next fork will find is ready, so that what is measured next has the processors.
    """
    began = time.perf_counter()
    (child,) = await parent.fork()
    calls.append((time.perf_counter() - began) * 1000)
    async with child, child.containers[container].process(["echo", "up"]) as process:
        await anext(process.stdout)
        elapsed = (time.perf_counter() - began) * 1000
        await process.wait()
    assert parent._open.next_fork
    await parent._open.next_fork.filled()
    return elapsed


async def forked_once(template: pykata.Template) -> float:
    """The same of a sandbox that wasn't forked before."""
    async with template.sandbox() as parent:
        assert parent.main
        return await forked(parent, parent.main.id, [])


async def pauses_when_large(template: pykata.Template, rounds: int) -> list[float]:
    """Milliseconds that a sandbox stands still which has much to be copied."""
    pauses = list[float]()
    async with template.sandbox() as parent:
        assert parent.main
        await parent.main.shell(f"dd if=/dev/zero of=/large bs=1M count={CHANGED}", check=True)
        watch_pauses(parent._open.vm, pauses)
        for _ in range(rounds):
            await parent.fork()
    return pauses


async def acquired(pool: pykata.Pool) -> float:
    """Milliseconds that a sandbox takes which is ready."""
    await pool.filled()
    began = time.perf_counter()
    async with pool.acquire():
        return (time.perf_counter() - began) * 1000


async def acquired_to_output(pool: pykata.Pool) -> float:
    """Milliseconds from asking for a sandbox that is ready to the first output of a command in it."""
    await pool.filled()
    began = time.perf_counter()
    async with pool.acquire() as sandbox, sandbox.process(IMAGE, ["echo", "up"]) as process:
        await anext(process.stdout)
        elapsed = (time.perf_counter() - began) * 1000
        await process.wait()
    return elapsed


async def warm_up(sandbox: pykata.Sandbox) -> None:
    """What a pool's user would do for whoever comes next."""
    await sandbox.run(IMAGE, ["true"])


async def private_memory(template: pykata.Template) -> list[float]:
    """PSS of QEMU in MiB, of each of several at once, idle with their agents connected."""
    async with AsyncExitStack() as stack:
        sandboxes = [await stack.enter_async_context(template.sandbox()) for _ in range(ALIVE)]
        await anyio.sleep(1)
        return [pss(sandbox._open.vm.pid) for sandbox in sandboxes]


async def bare_memory(hypervisor: QEMU, saved: SavedVM) -> list[float]:
    """The same of as many bare QEMUs."""
    with ExitStack() as stack:
        pids = [stack.enter_context(restored(hypervisor, saved))[1] for _ in range(ALIVE)]
        await anyio.sleep(1)
        return [pss(pid) for pid in pids]


async def measure(rounds: int) -> list[Row]:
    """A row for each way to start, and for what that takes."""
    rows, calls, pauses, blocks, auto_blocks = [], *(list[float]() for _ in range(4))
    hypervisor = QEMU(accel="tcg", agent="serial").saving()     # the floor's machines are those of the template
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ram_disk = initrd(Path(folder) / "initrd.cpio")
        guest = await stack.enter_async_context(booted(hypervisor, pykata.find_bundle().kernel, ram_disk, memory=256))
        saved = await stack.enter_async_context(guest.vm.saved())
        template = await stack.enter_async_context(
            pykata.Template(IMAGE, setup=[["echo", "warm"]], isolation="emulated", hypervisor=hypervisor, spares=0)
        )
        parent = await stack.enter_async_context(template.sandbox())

        watch_pauses(parent._open.vm, pauses)

        async def floor() -> float:
            return await anyio.to_thread.run_sync(bare, hypervisor, saved)

        async def from_template() -> float:
            return await first_output(template.sandbox(), blocks)

        async def enter() -> float:
            return await entered(template.sandbox())

        async def automatic() -> float:
            sandbox = pykata.Sandbox(isolation="emulated", hypervisor=hypervisor, template="auto")
            return await first_output(sandbox, auto_blocks)

        async def fork() -> float:
            return await forked(parent, parent.main.id, calls)

        async def first_fork() -> float:
            return await forked_once(template)

        await interleaved(first_image.IN_A_ROW + 1, floor, from_template, automatic, fork)
        for each in (calls, pauses, blocks, auto_blocks):
            each.clear()
        ways = floor, from_template, automatic, fork, first_fork
        at_best, ours, auto, forks, first_forks = await interleaved(rounds, *ways)
        rows.append(row("template to first output", "ms", ours, at_best))
        rows.append(row("  blocks translated by then", "", blocks))
        blocks.clear()
        rows.append(row("  with a machine kept ready", "ms", await with_spare(hypervisor, rounds, blocks), at_best))
        rows.append(row("  blocks translated by then", "", blocks))
        rows.append(row("template='auto' to first output", "ms", auto, at_best))
        rows.append(row("  blocks translated by then", "", auto_blocks))
        rows.append(row("fork to first output in the child", "ms", forks))
        rows.append(row("  until fork() has returned", "ms", calls))
        rows.append(row("  the parent stands still", "ms", pauses))
        large = await pauses_when_large(template, max(rounds // 3, 1))
        rows.append(row(f"  with {CHANGED} MiB changed", "ms", large))
        rows.append(row("fork of a sandbox that wasn't forked before", "ms", first_forks))
        rows += await rates(floor, enter, from_template)
        least = await bare_memory(hypervisor, saved)
        rows.append(row("PSS of QEMU, each of 20", "MiB", await private_memory(template), least))
        async with pykata.Pool(template, size=1) as pool:
            rows.append(row("Pool.acquire", "ms", [await acquired(pool) for _ in range(rounds)]))
        one = partial(pykata.Pool, template, size=1, limit=1)
        async with one() as cold, one(warm_up=warm_up) as warm:
            outputs = partial(acquired_to_output, cold), partial(acquired_to_output, warm)
            at_first, again = await interleaved(rounds, *outputs)
            rows.append(row("Pool.acquire to first output", "ms", at_first))
            rows.append(row("  with warm_up=", "ms", again))
    note("from a template: from entering the sandbox to the first output of echo; the floor echoes without a sandbox")
    return rows


if __name__ == "__main__":
    main(measure, rounds=15, about=__doc__)
