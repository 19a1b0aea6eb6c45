"""What the processes that a benchmark has started use of the CPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path


def descendants() -> frozenset[int]:
    """The processes that came of this one and are there now."""
    children: dict[int, list[int]] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue        # it has ended
        children.setdefault(int(fields[1]), []).append(pid)
    found: list[int] = []
    new = [os.getpid()]
    while new:
        new = [child for pid in new for child in children.get(pid, [])]
        found += new
    return frozenset(found)


def cpu_time(pids: Iterable[int]) -> float:
    """What all threads of these processes have used of the CPUs, in milliseconds (clock_getcpuclockid(3))."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids) * 1000
