"""Run by pytest inside the nested machine: sandboxes there get KVM without being asked to. Any warning is an error."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Literal

import pytest

import pykata
from pykata import QEMU, Sandbox

pytestmark = pytest.mark.slow

DEBUG = Path("/sys/kernel/debug/kvm")
MACHINES: tuple[Literal["microvm", "q35"], ...] = ("microvm", "q35")


def status(pid: int) -> dict[str, str]:
    """proc_pid_status(5)"""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("machine", MACHINES)
async def test_kvm_is_chosen_where_it_works(machine: Literal["microvm", "q35"]) -> None:
    async with Sandbox(QEMU(machine=machine)) as sb:
        assert sb.accel == "kvm"
        assert sb.isolation == "hardware"
        done = await sb.run("builtin:busybox", ["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.exit_code, done.stdout, done.stderr, done.reason) == (7, "out\n", "err\n", "exit")


async def test_hardware_isolation_is_granted() -> None:
    async with Sandbox(isolation="hardware") as sb:
        assert sb.isolation == "hardware"
        # What the kernel says: the VMM has a virtual machine of KVM's.
        assert any(name.startswith(f"{sb._open.vm.pid}-") for name in os.listdir(DEBUG))
        assert "hypervisor" in (await sb.run("builtin:busybox", ["cat", "/proc/cpuinfo"])).stdout


async def test_the_vmm_has_no_privilege_but_the_group_of_kvm() -> None:
    async with Sandbox() as sb:
        found = status(sb._open.vm.pid)
    assert "0" not in found["Uid"].split()
    assert "0" not in found["Gid"].split()
    assert found["Groups"].split() == [str(os.stat("/dev/kvm").st_gid)]
    assert {int(found[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")} == {0}


async def test_emulation_can_be_asked_for() -> None:
    # Not booted: an emulated machine in an emulated one takes minutes.
    emulated = QEMU(accel="tcg")
    assert emulated.accel_here() == "tcg"
    with pytest.raises(pykata.IsolationError):
        async with Sandbox(emulated, isolation="hardware"):
            pass


async def test_several_cpus() -> None:
    async with Sandbox(cpus=2) as sb:
        assert (await sb.run("builtin:busybox", ["nproc"])).stdout == "2\n"


async def test_a_vmm_that_is_killed_ends_the_command() -> None:
    async with Sandbox() as sb, sb.process("builtin:busybox", ["sh", "-c", "echo ready; sleep 1000"]) as process:
        assert await anext(process.stdout) == b"ready\n"
        os.kill(sb._open.vm.pid, signal.SIGKILL)
        with pytest.raises(pykata.VMDiedError, match="SIGKILL"):
            await process.wait()
