# ruff: noqa: ASYNC240 - /proc doesn't block
"""QEMU with a real kernel: it boots, gives nothing away, and says what it died of."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import anyio
import anyio.lowlevel
import pytest

from pykata.errors import BootError, GuestPanicError, HostError, ToolTooOldError, VMDiedError
from pykata.guest import Bundle
from pykata.hypervisors.qemu import QEMU
from pykata.hypervisors.qemu.console import SIZE
from pykata.hypervisors.qemu.qmp import QMPClosedError
from pykata.hypervisors.qemu.vm import QemuVM
from pykata.spec import Disk, Nic, SerialTransport, VMSpec
from tests.cancellation import cancel_everywhere
from tests.vm.qemu_guest import booted, check_confined, inherited, initrd

Machine = Literal["microvm", "q35"]
both = pytest.mark.parametrize("machine", ["microvm", "q35"])


@pytest.fixture(scope="module")
def ramdisk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return initrd(tmp_path_factory.mktemp("initrd") / "initrd.cpio")


def qemu(machine: Machine = "microvm", **options: object) -> QEMU:
    return QEMU(machine=machine, accel="tcg", **options)  # type: ignore[arg-type]


async def until(true: Callable[[], bool]) -> None:
    """Wait for what no event tells."""
    with anyio.fail_after(300):
        while not true():       # noqa: ASYNC110
            await anyio.sleep(0.02)


@both
async def test_boots(machine: Machine, bundle: Bundle, ramdisk: Path) -> None:
    async with booted(qemu(machine), bundle.kernel, ramdisk) as guest:
        assert guest.vm.accel == "tcg"
        assert guest.vm.spawned_at <= guest.vm.ready_at
        clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
        code, said = await guest.run(f"cat /proc/cmdline {clock}")
        assert code == 0
        assert "loglevel=4" in said
        assert said.splitlines()[-1].startswith("tsc")
        # A clock event device that can be programmed for any time, so that an idle guest doesn't tick.
        assert (await guest.run("cat /sys/devices/system/clockevents/clockevent0/current_device"))[1].strip() == "lapic"
        code, serials = await guest.run("for d in /sys/block/vd*; do echo $(cat $d/serial); done")
        assert serials.split() == [f"slot{n}" for n in range(5)]


@both
async def test_more_cpus(machine: Machine, bundle: Bundle, ramdisk: Path) -> None:
    async with booted(qemu(machine), bundle.kernel, ramdisk, cpus=2) as guest:
        assert await guest.run("nproc") == (0, "2\n")


@both
async def test_what_qemu_has(machine: Machine, bundle: Bundle, ramdisk: Path) -> None:
    """Nobody, no capabilities, a system call filter, no environment, nothing of ours but what it was given."""
    async with booted(qemu(machine), bundle.kernel, ramdisk) as guest:
        proc = Path(f"/proc/{guest.vm.pid}")
        check_confined(guest.vm.pid)
        assert inherited(guest.vm.pid) == sorted([
            "/dev/null", "pipe:", "pipe:",                  # stdin, the console, stderr
            "socket:", "socket:",                           # control, agent
            re.sub(r"\d+", "", str(bundle.kernel)), re.sub(r"\d+", "", str(ramdisk)),
        ])  # fmt: skip

        # Nothing of the user's is in the argv, which any user of the host can read.
        argv = (proc / "cmdline").read_bytes().split(b"\0")
        for path in (bundle.kernel, ramdisk, Path.home()):
            assert not any(os.fsencode(path) in word for word in argv)


async def test_two_machines_are_two_users(bundle: Bundle, ramdisk: Path) -> None:
    async with booted(qemu(), bundle.kernel, ramdisk) as one, booted(qemu(), bundle.kernel, ramdisk) as other:
        uids = {Path(f"/proc/{guest.vm.pid}").stat().st_uid for guest in (one, other)}
        assert len(uids) == (2 if os.geteuid() == 0 else 1)


async def test_console_is_bounded_and_printable(bundle: Bundle, ramdisk: Path) -> None:
    async with booted(qemu(), bundle.kernel, ramdisk) as guest:
        said = f"yes hello | head -c {2 * SIZE} >/dev/console; printf '\\033[31mred\\n' >/dev/console"
        assert (await guest.run(said))[0] == 0
        await until(lambda: "red" in guest.vm.console())        # the serial port takes its time
        console = guest.vm.console()
        assert len(console) <= SIZE
        assert "\\x1b[31mred" in console
        assert "\x1b" not in console


@both
async def test_panic(machine: Machine, bundle: Bundle, ramdisk: Path) -> None:
    async with booted(qemu(machine), bundle.kernel, ramdisk) as guest:
        asyncio.get_running_loop().call_soon(guest.stream.send, b"exit 3\n")
        with anyio.fail_after(300):
            error = await guest.vm.died()
        assert isinstance(error, GuestPanicError)
        assert "Attempted to kill init! exitcode=0x00000300" in str(error)
        assert "Kernel panic - not syncing" in error.console
        assert str(await guest.vm.died()) == str(error)


@both
async def test_reboot_ends_it(machine: Machine, bundle: Bundle, ramdisk: Path) -> None:
    async with booted(qemu(machine), bundle.kernel, ramdisk) as guest:
        await asyncio.get_running_loop().sock_sendall(guest.stream, b"reboot -f\n")
        with anyio.fail_after(300):
            error = await guest.vm.died()
        assert type(error) is VMDiedError
        assert str(error) == "the guest switched its machine off (guest-reset)"


async def test_killed(bundle: Bundle, ramdisk: Path) -> None:
    async with booted(qemu(), bundle.kernel, ramdisk) as guest:
        waiting = [asyncio.ensure_future(guest.vm.died()) for _ in range(3)]
        await anyio.lowlevel.checkpoint()
        os.kill(guest.vm.pid, signal.SIGKILL)
        with anyio.fail_after(300):
            errors = await asyncio.gather(*waiting)
            assert {error.message for error in errors} == {"QEMU was killed by SIGKILL"}
            # Its end closes the stream to the agent, too.
            assert await asyncio.get_running_loop().sock_recv(guest.stream, 1) == b""


async def test_paused(bundle: Bundle, ramdisk: Path) -> None:
    """A machine that QEMU itself pauses would never answer again."""
    async with booted(qemu(), bundle.kernel, ramdisk) as guest:
        assert isinstance(guest.vm, QemuVM)
        # The event comes before the answer: QEMU may be ended for it by then.
        with suppress(QMPClosedError):
            await guest.vm._qmp.execute("stop")
        with anyio.fail_after(300):
            assert str(await guest.vm.died()) == "QEMU could not run the machine any further"


@both
async def test_network_device(machine: Machine, bundle: Bundle, ramdisk: Path) -> None:
    """There is room for one beside the slots, and its backend is whatever a network strategy says."""
    nic = Nic("net", "02:00:00:00:00:01", {"type": "user", "restrict": True})
    async with booted(qemu(machine), bundle.kernel, ramdisk, devices=(nic,)) as guest:
        code, said = await guest.run("cat /sys/class/net/eth0/address && ip link set eth0 up && ls /sys/block")
        assert code == 0
        assert said.split() == ["02:00:00:00:00:01", "vda", "vdb", "vdc", "vdd", "vde"]


async def failure(qemu: QEMU, **spec: object) -> Exception:
    async with qemu.transport(Path("/nonexistent")) as transport:
        with pytest.raises((BootError, HostError)) as caught:
            async with qemu.boot(VMSpec(transport=transport, **spec), Path("/nonexistent")):  # type: ignore[arg-type]
                pass
        return caught.value


async def test_failures_have_types(bundle: Bundle, ramdisk: Path, tmp_path: Path) -> None:
    error = await failure(qemu(), kernel=bundle.kernel, initrd=ramdisk, memory=1 << 40)
    assert isinstance(error, BootError)
    assert str(error).startswith("before it answered, QEMU exited with code 1: ")

    error = await failure(qemu(), kernel=ramdisk, initrd=ramdisk)
    assert isinstance(error, BootError)
    assert "QEMU exited with code 1" in str(error)

    error = await failure(qemu(), kernel=tmp_path / "none", initrd=ramdisk)
    assert str(error) == f"can't open {tmp_path}/none for the virtual machine: No such file or directory"

    error = await failure(qemu(binary="/bin/false"), kernel=bundle.kernel, initrd=ramdisk)
    assert "/bin/false is no QEMU that works" in str(error)

    old = tmp_path / "old"
    old.write_text("#!/bin/sh\n[ $1 = --version ] && echo 'QEMU emulator version 6.1.0' || exit 1\n")
    old.chmod(0o755)
    error = await failure(qemu(binary=old), kernel=bundle.kernel, initrd=ramdisk)
    assert isinstance(error, ToolTooOldError)
    assert str(error) == f"{old} is QEMU 6.1.0 (QEMU 7.2 or later is needed)"


async def test_out_of_descriptors(bundle: Bundle, ramdisk: Path) -> None:
    """Wherever they run out, it is a HostError, and what was opened is closed (``nothing_left``)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(first := os.dup(0))        # the lowest number that is free
    errors: list[str] = []
    for limit in range(first, first + 40):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            async with booted(qemu(), bundle.kernel, ramdisk):
                break
        except HostError as error:
            errors.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    else:
        pytest.fail(f"never enough: {errors[-1]}")
    assert len(errors) > 5


@pytest.mark.skipif(os.geteuid() != 0, reason="root's files are closed to its own VMM only if there is a root")
async def test_files_that_only_root_may_read(bundle: Bundle, ramdisk: Path, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(bundle.kernel.read_bytes())
    kernel.chmod(0o600)
    async with booted(qemu(), kernel, ramdisk) as guest:
        assert await guest.run("true") == (0, "")


@both
async def test_disks_from_the_start(machine: Machine, bundle: Bundle, ramdisk: Path, tmp_path: Path) -> None:
    """Whatever their paths look like, they are raw, and one that is read-only stays it."""
    written, read = tmp_path / "a,b:c=d.img", tmp_path / "qcow2"
    written.write_bytes(bytes(1 << 20))
    read.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(8192 - 8))
    disks = (Disk("data", written, readonly=False), Disk("ro,readonly=off", read))
    async with booted(qemu(machine, disk_slots=2), bundle.kernel, ramdisk, devices=disks) as guest:
        assert (await guest.run("echo hello >$(disk data) && sync"))[0] == 0
        assert await guest.run("head -c 3 $(disk ro,readonly=off)") == (0, "QFI")
        assert (await guest.run("echo hello >$(disk ro,readonly=off)"))[0] != 0
    assert written.read_bytes().startswith(b"hello\n")


async def test_freed_memory_comes_back(bundle: Bundle, ramdisk: Path) -> None:
    async with booted(qemu(), bundle.kernel, ramdisk, memory=256) as guest:
        def resident() -> int:
            status = Path(f"/proc/{guest.vm.pid}/status").read_text()
            return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) // 1024  # type: ignore[index]

        before = resident()
        fill = "mount -t tmpfs -o size=200M x /mnt/a && dd if=/dev/zero of=/mnt/a/file bs=1M count=120"
        assert (await guest.run(fill))[0] == 0
        assert resident() > before + 100
        await guest.run("umount /mnt/a")
        await until(lambda: resident() < before + 40)       # the guest reports what it freed every two seconds


async def test_cancelled_anywhere(bundle: Bundle, ramdisk: Path) -> None:
    """The fixture ``nothing_left`` sees what a cancelled boot leaves."""
    machine = qemu()

    async def start_and_stop() -> None:
        async with machine.transport(Path("/nonexistent")) as transport:
            assert isinstance(transport, SerialTransport)
            async with machine.boot(VMSpec(bundle.kernel, ramdisk, transport), Path("/nonexistent")) as vm:
                pids.append(vm.pid)

    async def gone(n: int, way: str) -> None:
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        assert asyncio.all_tasks() == tasks

    tasks = asyncio.all_tasks()
    pids: list[int] = []
    assert await cancel_everywhere(start_and_stop, gone) >= 2
