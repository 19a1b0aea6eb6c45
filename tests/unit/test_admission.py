"""Who may start a machine now: turns that all processes of a user share, and memory."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import anyio
import pytest

from pykata import AdmissionError, Sandbox, admission, host
from pykata.admission import admitted, admitted_now, fits, giving, reserve
from pykata.errors import ConfigError
from pykata.host import Room, locked_one_of
from pykata.spec import MIB
from pykata.testing import FakeHypervisor

pytestmark = pytest.mark.usefixtures("guest")

HOLD = """
import fcntl, os, sys
for name in sys.argv[1:]:
    fcntl.flock(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hypervisor() -> FakeHypervisor:
    return FakeHypervisor()


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[Room]:
    """What the host has, one reading after the other; the last one stays."""
    readings = [Room(1024 * MIB, 1024 * MIB)]
    monkeypatch.setattr(host, "room", lambda: readings.pop(0) if len(readings) > 1 else readings[0])
    monkeypatch.setattr(admission, "AGAIN", 0.001)
    return readings


def test_a_part_is_left_to_others() -> None:
    assert reserve(Room(1024 * MIB, 0)) == 256 * MIB
    assert reserve(Room(100 * 1024 * MIB, 0)) == 5 * 1024 * MIB
    assert fits(100 * MIB, Room(1024 * MIB, 356 * MIB))
    assert not fits(100 * MIB, Room(1024 * MIB, 355 * MIB))


async def test_without_room_it_fails_and_says_who_has_it(room: list[Room], hypervisor: FakeHypervisor) -> None:
    async with Sandbox(hypervisor):
        room[:] = [Room(1024 * MIB, 300 * MIB)]
        with pytest.raises(AdmissionError, match="300 MiB of memory are free, it takes 128 MiB, and 256 MiB are") as no:
            async with Sandbox(hypervisor, admission_timeout=0):
                pass
    (line,) = [line for line in no.value.used if line.startswith(f"process {os.getpid()} ")]
    assert ": 2 with" in line       # the one that waits has its directory already
    assert line in str(no.value)
    assert isinstance(no.value, TimeoutError)
    assert len(hypervisor.machines) == 1


async def test_it_waits_for_room(room: list[Room], hypervisor: FakeHypervisor) -> None:
    room[:] = [*[Room(1024 * MIB, 0)] * 5, Room(1024 * MIB, 1024 * MIB)]
    async with Sandbox(hypervisor, admission_timeout=None):
        assert len(room) == 1
    for bad in (-1, "x", True):
        with pytest.raises(ConfigError, match="admission_timeout"):
            Sandbox(hypervisor, admission_timeout=bad)  # type: ignore[arg-type]


async def test_a_wait_for_room_gives_its_turn_back(room: list[Room]) -> None:
    room[:] = [Room(0, 0)]
    for _ in range(3):
        with anyio.move_on_after(0.01) as left:
            async with admitted(1, 60):
                pass
        assert left.cancelled_caught
    room[:] = [Room(1024 * MIB, 1024 * MIB)]
    async with admitted(1, 0):
        pass


async def test_turns_are_shared_with_other_processes(tmp_path: Path) -> None:
    locks = [tmp_path / "0", tmp_path / "1"]
    async with await anyio.open_process([sys.executable, "-c", HOLD, *map(str, locks)]) as other:
        assert other.stdout is not None
        assert (await other.stdout.receive()).startswith(b"held")
        entered = anyio.Event()

        async def enter() -> None:
            async with locked_one_of(locks):
                entered.set()

        async with anyio.create_task_group() as group:
            group.start_soon(enter)
            await anyio.wait_all_tasks_blocked()
            assert not entered.is_set()
            other.send_signal(signal.SIGKILL)      # what a killed process has is free
            with anyio.fail_after(300):
                await entered.wait()
    async with locked_one_of(locks), locked_one_of(locks):
        pass


def test_what_the_host_has() -> None:
    found = host.room()
    assert 0 < found.available <= found.total


def test_a_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 900 kB\n")
    (proc / "self/cgroup").write_text("4:cpu,memory:/v1\n2:pids:/elsewhere\n0::/outer/inner\n")
    monkeypatch.setattr("pykata.host.capacity.PROC", proc)
    monkeypatch.setattr("pykata.host.capacity.CGROUPS", groups)
    assert host.room() == Room(1000 * 1024, 900 * 1024)
    (groups / "outer/inner").mkdir(parents=True)
    for folder, limit in ((groups / "outer", "800000"), (groups / "outer/inner", "max")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("300000\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 1000\nactive_file 2000\n")
    assert host.room() == Room(800000, 503000)
    (groups / "memory/v1").mkdir(parents=True)
    (groups / "memory/v1/memory.limit_in_bytes").write_text("500000\n")
    (groups / "memory/v1/memory.usage_in_bytes").write_text("600000\n")
    (groups / "memory/v1/memory.stat").write_text("total_inactive_file 7\n")
    assert host.room() == Room(500000, 0)
    (groups / "memory/v1/memory.limit_in_bytes").write_text("9223372036854771712\n")     # how v1 says "none"
    assert host.room() == Room(800000, 503000)


async def test_what_is_kept_ready_is_given_up_for_what_is_asked_for(room: list[Room]) -> None:
    room[:] = [Room(0, 0)]
    kept = [1, 2]

    def give_up() -> bool:
        if not kept:
            return False
        kept.pop()
        if not kept:
            room[:] = [Room(1024 * MIB, 1024 * MIB)]
        return True

    async with admitted_now(1) as fits:
        assert not fits
    assert kept == [1, 2], "nobody waits for it"
    with giving(lambda: False), giving(give_up):
        async with admitted(1, 60):
            assert not kept
    async with admitted_now(1) as fits:
        assert fits
