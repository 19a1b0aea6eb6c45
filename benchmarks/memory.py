"""What a sandbox costs in memory: QEMU's own on the host, and what the guest uses before anything runs in it."""

from __future__ import annotations

from pathlib import Path

import anyio

import pykata
from benchmarks._table import Row, main, row

MEMORY = 256
MIB = 1024 * 1024


def pss(pid: int) -> float:
    """Proportional set size of a process in MiB (proc_pid_smaps(5)): shared pages are divided among their users."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"no Pss for {pid}")


def guest_ram(pid: int) -> float:
    """The resident part of the mapping that is the guest's memory, in MiB: the one of exactly its size."""
    size, resident = 0, 0.0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "Size":
            size = int(value.split()[0])
        elif key == "Pss" and size == MEMORY * 1024:
            resident += int(value.split()[0]) / 1024
    return resident


async def measure(rounds: int) -> list[Row]:
    """Rows for the host's side and the guest's, of sandboxes that did nothing yet."""
    total: list[float] = []
    beyond: list[float] = []
    used: list[float] = []
    agent: list[float] = []
    for _ in range(rounds):
        async with pykata.Sandbox(memory=MEMORY, isolation="emulated", template="off") as sandbox:
            running = sandbox._open
            stats = await running.agent.stats()
            resident = pss(running.vm.pid)
            total.append(resident)
            beyond.append(resident - guest_ram(running.vm.pid))
            used.append((stats.memory_total - stats.memory_available) / MIB)
            agent.append(stats.agent_rss / MIB)
            await anyio.lowlevel.checkpoint()
    return [
        row("PSS of QEMU", "MiB", total),
        row("  of it beyond the guest's memory", "MiB", beyond),
        row("used in the guest after the boot", "MiB", used),
        row("  of it resident in the agent", "MiB", agent),
    ]


if __name__ == "__main__":
    main(measure, rounds=5, about=__doc__)
