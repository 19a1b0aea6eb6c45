"""How fast files of volumes are in a guest: 64 MB written and read, 1,000 small files made, listed, read and removed.

All ways are measured in the same sandboxes, one after the other. What was written by one sandbox is read by another, so
that nothing comes from the guest's memory. The floor of what is written is a tmpfs: the same commands without a device.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pykata
from benchmarks._table import Row, main, row

PLACES = ("tmpfs", "disk", "virtio-fs", "virtio-fs, cache=always", "9p")
FIRST = {
    "write 64 MB": "dd if=/dev/zero of=big bs=1M count=64 conv=fsync 2>/dev/null",
    "1,000 files made": "mkdir d; i=0; while [ $i -lt 1000 ]; do echo $i > d/$i; i=$((i+1)); done",
}
THEN = {
    "read 64 MB": "dd if=big of=/dev/null bs=1M 2>/dev/null",
    "1,000 files listed": "ls -l d > /dev/null",
    "1,000 files read": "cat d/* > /dev/null",
    "1,000 files removed": "rm -r d big",
}
CLOCK = "read up _ < /proc/uptime; echo $up"      # in hundredths of a second; busybox has nothing finer

Found = dict[tuple[str, int], list[float]]


async def measure(rounds: int) -> list[Row]:
    """Rows for each kind of work in each place."""
    found: Found = {}
    with tempfile.TemporaryDirectory() as top:
        volumes = _volumes(Path(top))
        for _ in range(rounds):
            async with _sandbox({"/p0": pykata.Tmpfs("128M"), **volumes}) as sandbox:
                for place in range(len(PLACES)):
                    await _timed(sandbox, place, FIRST, found)
            async with _sandbox(volumes) as sandbox:
                for place in range(1, len(PLACES)):
                    await _timed(sandbox, place, THEN, found)
    return [
        row(f"{name}: {PLACES[place]}", "ms", found[name, place], found.get((name, 0), ()))
        for name in (*FIRST, *THEN) for place in range(len(PLACES)) if (name, place) in found
    ]  # fmt: skip


def _volumes(top: Path) -> dict[str, Any]:
    for name in ("auto", "always", "9p"):
        (top / name).mkdir()
    return {
        "/p1": pykata.DiskImage(top / "disk", size="256M"),
        "/p2": pykata.Bind(top / "auto", via="virtiofs"),
        "/p3": pykata.Bind(top / "always", via="virtiofs", cache="always"),
        "/p4": pykata.Bind(top / "9p", via="9p"),
    }


def _sandbox(volumes: dict[str, Any]) -> pykata.Sandbox:
    return pykata.Sandbox(isolation="emulated", volumes=volumes, memory="512M")


async def _timed(sandbox: pykata.Sandbox, place: int, work: dict[str, str], found: Found) -> None:
    steps = "; ".join(f"{each}; {CLOCK}" for each in work.values())
    done = await sandbox.run("builtin:busybox", ["sh", "-c", f"cd /p{place}; {CLOCK}; {steps}"], check=True)
    times = [float(line) * 1000 for line in done.stdout.split()]
    for name, before, after in zip(work, times[:-1], times[1:], strict=True):
        found.setdefault((name, place), []).append(max(after - before, 10.0))


if __name__ == "__main__":
    main(measure, rounds=3, about=__doc__)
