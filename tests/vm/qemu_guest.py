"""A guest without the agent: the bundle's kernel, and a shell at the other end of the agent's port."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
from attrs import frozen

from pykata.guest.cpio import directory, newc, program
from pykata.hypervisors.base import VM
from pykata.hypervisors.qemu import QEMU
from pykata.spec import Device, VMSpec
from pykata.transport import connect

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
disk() { for d in /sys/block/vd*; do [ "$(cat $d/serial)" = "$1" ] && echo "/dev/${d##*/}"; done; }
port=$(grep -lx pykata.agent.0 /sys/class/virtio-ports/*/name)
port=${port%/name}
exec <>/dev/${port##*/} >&0 2>&0
while read -r line; do eval "$line"; echo "=$?="; done
"""


@frozen
class Guest:
    """A virtual machine whose PID 1 runs what one says."""

    vm: VM
    stream: socket.socket

    async def run(self, line: str) -> tuple[int, str]:
        """Run a line of shell; returns its exit code and what it wrote."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.stream, line.encode() + b"\n")
        said = bytearray()
        with anyio.fail_after(300):
            while not (end := re.search(rb"=(\d+)=\n$", said)):
                data = await loop.sock_recv(self.stream, 65536)
                assert data, f"the guest went away: {self.vm.console()}"
                said += data
        return int(end[1]), said[:end.start()].decode()


def initrd(path: Path) -> Path:
    """Write a RAM disk with a shell."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    folders = [directory(name) for name in ("bin", "dev", "proc", "sys", "mnt", "mnt/a", "mnt/b")]
    path.write_bytes(newc([
        *folders, program("bin/busybox", Path(busybox).read_bytes()), program("init", INIT.encode()),
    ]))  # fmt: skip
    return path


@asynccontextmanager
async def booted(
    qemu: QEMU, kernel: Path, ramdisk: Path, *, cpus: int = 1, memory: int = 128, devices: tuple[Device, ...] = ()
) -> AsyncIterator[Guest]:
    """A guest that answers."""
    nowhere = Path("/nonexistent")      # QEMU needs no directory of its own
    async with qemu.transport(nowhere) as transport:
        spec = VMSpec(kernel, ramdisk, transport, cpus=cpus, memory=memory, devices=devices)
        async with qemu.boot(spec, nowhere) as vm:
            guest = Guest(vm, await connect(transport))
            assert await guest.run("true") == (0, "")
            yield guest


def check_confined(pid: int) -> None:
    """A QEMU is nobody, without capabilities and environment, behind a filter of system calls."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    if os.geteuid() == 0:
        assert len({*status["Uid"].split(), *status["Gid"].split()}) == 1
        assert int(status["Uid"].split()[0]) >= 1_900_000_000
        assert status["Groups"].split() == []
        assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    # Every thread has the filter, not only the first one.
    threads = _each(proc / "task", lambda task: (task / "status").read_text())
    assert threads
    assert all("Seccomp:\t2\n" in text for text in threads)
    assert (proc / "environ").read_bytes() == b""
    assert (proc / "cwd").readlink() == Path("/")
    assert os.getpgid(pid) == pid != os.getpgid(0)


def inherited(pid: int) -> list[str]:
    """What a QEMU has open that it didn't open itself, without numbers."""
    links = _each(Path(f"/proc/{pid}/fd"), os.readlink)
    kinds = sorted(re.sub(r"\d+|\[|\]", "", name) for name in links)
    own = ("anon_inode:eventfd", "anon_inode:eventpoll", "anon_inode:signalfd", "anon_inode:io_uring", "/memfd:")
    return [kind for kind in kinds if not kind.startswith(own)]


def _each(directory: Path, look: Callable[[Path], str]) -> list[str]:
    """What all in a directory of /proc have; a thread or descriptor may go between the listing and the look."""
    found: list[str] = []
    for path in directory.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append(look(path))
    return found


def words(pid: int) -> list[str]:
    """The command line of a process, which any user of the host can read."""
    return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
