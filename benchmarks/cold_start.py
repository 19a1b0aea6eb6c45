"""From entering a Sandbox to the first byte of a command's output, beside a bare QEMU with the same kernel.

There is a row for a Sandbox as it is by default, which goes on from the template of its kind where there is one, and a
row for one that boots (``template="off"``).

The floor is a bare QEMU with the very command line of ``pykata.hypervisors.qemu.command``, the same kernel, and as
``/init`` a static program that writes a line and powers off, until QEMU has ended. The time to that line, which no
sandbox on this hypervisor can be faster than, has a row of its own. All are measured in turns.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import anyio

import pykata
from benchmarks._table import Row, interleaved, main, note, row
from pykata.guest.cpio import character_device, directory, newc, program
from pykata.hypervisors.qemu import QEMU, accel
from pykata.hypervisors.qemu.command import Descriptors, command
from pykata.spec import SerialTransport, VMSpec

INIT = r"""
#include <sys/reboot.h>
#include <unistd.h>
int main(void) { write(1, "up\n", 3); reboot(RB_AUTOBOOT); for (;;) pause(); }
"""


def initrd(folder: Path) -> Path:
    """A RAM disk that writes ``up`` and ends the machine: with ``-no-reboot`` a restart is the end of QEMU."""
    source, binary, result = folder / "init.c", folder / "init", folder / "initrd.cpio"
    source.write_text(INIT)
    subprocess.run(["gcc", "-static", "-Os", "-s", "-o", binary, source], check=True)
    entries = [directory("dev"), character_device("dev/console", 5, 1), program("init", binary.read_bytes())]
    result.write_bytes(newc(entries))
    return result


def bare(hypervisor: QEMU, kernel: Path, ram_disk: Path, to_line: list[float]) -> float:
    """Milliseconds from starting QEMU to its end; those to the line of its /init are added to ``to_line``."""
    with ExitStack() as stack:
        agent, control = socket.socketpair(), socket.socketpair()
        for end in (*agent, *control):
            stack.enter_context(end)
        files = [stack.enter_context(path.open("rb")) for path in (kernel, ram_disk)]
        spec = VMSpec(kernel=kernel, initrd=ram_disk, transport=SerialTransport(host=agent[0], vmm=agent[1]))
        given = Descriptors(
            start=(files[0].fileno(), files[1].fileno()), control=control[1].fileno(), agent=agent[1].fileno()
        )
        argv = command(
            hypervisor._binary(), hypervisor.machine, hypervisor.accel_here(), spec, given,
            slots=hypervisor.features.disk_slots, reclaim=hypervisor.reclaim, tsc_khz=accel.tsc_khz(),
        )  # fmt: skip
        began = time.perf_counter()
        with subprocess.Popen(argv, pass_fds=given.all(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
            assert qemu.stdout is not None
            for line in qemu.stdout:
                if line.strip() == b"up":
                    to_line.append((time.perf_counter() - began) * 1000)
                    qemu.wait()
                    return (time.perf_counter() - began) * 1000
    raise RuntimeError("the bare guest ended without a word")


async def sandboxed(hypervisor: QEMU, template: Literal["auto", "off"]) -> float:
    """Milliseconds from entering a sandbox to the first byte of ``echo``."""
    began = time.perf_counter()
    async with (
        pykata.Sandbox(hypervisor, isolation="emulated", template=template) as sandbox,
        sandbox.process("builtin:busybox", ["echo", "up"]) as process,
    ):
        await anext(process.stdout)
        elapsed = (time.perf_counter() - began) * 1000
        await process.wait()
    return elapsed


async def measure(rounds: int) -> list[Row]:
    """A row for each machine type."""
    rows = []
    kernel = pykata.find_bundle().kernel
    with tempfile.TemporaryDirectory() as folder:
        ram_disk = initrd(Path(folder))
        for hypervisor in (QEMU(machine="microvm"), QEMU(machine="q35")):

            to_line: list[float] = []

            async def floor(hypervisor: QEMU = hypervisor, to_line: list[float] = to_line) -> float:
                return await anyio.to_thread.run_sync(bare, hypervisor, kernel, ram_disk, to_line)

            async def by_default(hypervisor: QEMU = hypervisor) -> float:
                return await sandboxed(hypervisor, "auto")

            async def boot(hypervisor: QEMU = hypervisor) -> float:
                return await sandboxed(hypervisor, "off")

            await interleaved(1, floor, by_default, boot)
            at_best, ours, boots = await interleaved(rounds, floor, by_default, boot)
            rows.append(row(f"start, {hypervisor.machine}, {hypervisor.accel_here()}", "ms", ours, at_best))
            rows.append(row("  of a sandbox that boots (template='off')", "ms", boots, at_best))
            rows.append(row("  bare QEMU to the line of its /init", "ms", to_line[1:]))
    note("start: from entering a sandbox to the first output; the floor: a bare QEMU that boots, prints and powers off")
    return rows


if __name__ == "__main__":
    main(measure, rounds=15, about=__doc__)
