"""How much memory the host has left, and what the sandboxes of this user take of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from pykata.host.directories import owner_of, run_root
from pykata.spec import MIB

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


@frozen
class Room:
    """Bytes of memory: all there is for us, and what can be taken of it before something is swapped out or killed."""

    total: int
    available: int


@frozen
class Use:
    """What a process of this user has running. ``memory`` is bytes, shared ones counted in parts (PSS)."""

    pid: int
    command: str
    sandboxes: int
    memory: int

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command}): {self.sandboxes} with {self.memory // MIB} MiB"


def room() -> Room:
    """What the host has, or less where a control group above us has a limit."""
    found = _numbers((PROC / "meminfo").read_text())
    total = found["MemTotal"] * 1024
    rooms = [Room(total, found["MemAvailable"] * 1024), *_limits(total)]
    return Room(min(each.total for each in rooms), min(each.available for each in rooms))


def all_memory() -> int:
    """Bytes that one process may have, used or not: the kernel gives it no more (overcommit-accounting.rst, mode 0)."""
    found = _numbers((PROC / "meminfo").read_text())
    return (found["MemTotal"] + found["SwapTotal"]) * 1024


def _limits(total: int) -> Iterator[Room]:
    """Those of the control groups we are in (cgroup_v2, "Memory Interface Files"; v1, memory.rst)."""
    for line in (PROC / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, current, files = CGROUPS, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            top, limit, current = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = ("total_inactive_file", "total_active_file")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in [group, *group.parents][: len(group.parts) - len(top.parts) + 1]:
            try:
                most = (folder / limit).read_text().strip()
                if most == "max" or int(most) >= total:     # none; v1 has no word for that
                    continue
                used, stat = int((folder / current).read_text()), _numbers((folder / "memory.stat").read_text())
            except (FileNotFoundError, PermissionError):    # the topmost has no limit, and ours may be out of sight
                continue
            reclaimable = sum(stat.get(name, 0) for name in files)
            yield Room(int(most), max(0, int(most) - used + reclaimable))


def _numbers(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", text, re.MULTILINE)}


def in_use() -> list[Use]:
    """The processes of this user that have sandboxes, the largest first. Takes a millisecond for each sandbox."""
    counts = Counter(pid for path in run_root().iterdir() if path.is_dir() and (pid := owner_of(path)) is not None)
    memory: Counter[int] = Counter()
    for folder in PROC.iterdir():
        if folder.name.isdigit() and (parent := _parent(folder)) in counts:
            memory[parent] += _pss(folder)
    uses = [Use(pid, _command(PROC / str(pid)), count, memory[pid]) for pid, count in counts.items()]
    return sorted(uses, key=lambda use: use.memory, reverse=True)


def _parent(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])     # proc_pid_stat(5), field 4
    except OSError:
        return 0


def _pss(folder: Path) -> int:
    try:
        return _numbers((folder / "smaps_rollup").read_text()).get("Pss", 0) * 1024
    except OSError:
        return 0


def _command(folder: Path) -> str:
    try:
        words = (folder / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return "ended"
    text = b" ".join(words).decode(errors="replace").strip()
    return text if len(text) <= 60 else f"{text[:57]}..."
