"""A guest without the agent: the bundle's kernel, and a shell at the other end of the agent's port."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
        with anyio.fail_after(60):
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
