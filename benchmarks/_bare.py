"""QEMU and its file servers driven by hand, without pykata: the floor of what files in a guest can be."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from attrs import frozen

from pykata.guest import find_bundle
from pykata.guest.cpio import character_device, directory, newc, program
from pykata.hypervisors.qemu import aio
from pykata.hypervisors.qemu.accel import tsc_khz

QEMU = Path(shutil.which("qemu-system-x86_64") or "qemu-system-x86_64")
VIRTIOFSD = os.environ.get("PYKATA_VIRTIOFSD", "/usr/lib/qemu/virtiofsd")
MOUNTS = {
    "disk": "mount -t ext4 /dev/vda /m",
    "virtio-fs": "mount -t virtiofs fs /m",
    "virtio-fs, cache=always": "mount -t virtiofs fs /m",
    "9p": "mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap fs /m",
    "9p, cache=always": "mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose fs /m",
}
INIT = """#!/bin/busybox sh
busybox mount -t devtmpfs dev /dev; busybox mount -t proc proc /proc
busybox --install -s /bin; export PATH=/bin; exec < /dev/ttyS0 > /dev/ttyS0 2>&1; stty -echo
{mount} || echo FAILED
{before}; {loop}
cd /; umount /m; sync; reboot -f
"""
END = "END"     # a line that the guest's answers end with


@frozen
class Shell:
    """A shell in a guest that reads lines and runs each, until there is an empty one."""

    LOOP = f"echo {END}; while read -r line && [ -n \"$line\" ]; do eval \"$line\"; echo {END}; done"

    send: Callable[[bytes], Awaitable[None]]
    line: Callable[[], Awaitable[bytes]]

    async def answer(self) -> list[str]:
        """What it has written by the next END."""
        said: list[str] = []
        while (line := (await self.line()).decode(errors="replace")).strip() != END:
            assert line, said
            said.append(line.strip())
        return said

    async def run(self, script: str) -> list[str]:
        """The lines that a script writes; it is one line itself."""
        await self.send(script.encode() + b"\n")
        return await self.answer()


@asynccontextmanager
async def guest(way: str, place: Path, before: str, folder: Path, *, memory: int = 512) -> AsyncIterator[Shell]:
    """A shell that has done ``before`` in a guest. That has ``place``, ext4 or a directory, by this way at /m."""
    bundle = find_bundle()
    busybox = shutil.which("busybox")
    assert busybox is not None
    initrd = folder / "bare.cpio"
    script = INIT.format(mount=MOUNTS[way], before=before, loop=Shell.LOOP)
    initrd.write_bytes(newc([
        *(directory(name) for name in ("dev", "proc", "bin", "m", "tmp")), character_device("dev/console", 5, 1),
        program("bin/busybox", Path(busybox).read_bytes()), program("init", script.encode()),  # noqa: ASYNC240
    ]))  # fmt: skip
    daemon = await _daemon(way, place, folder) if way.startswith("virtio-fs") else None
    try:
        argv = _qemu(way, place, folder, memory, bundle.kernel, initrd)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            shell = Shell(_sends(process.stdin), process.stdout.readline)
            assert "FAILED" not in await shell.answer()
            yield shell
            await shell.send(b"\n")
            await process.communicate()
        finally:
            await _ended(process)
    finally:
        if daemon is not None:
            await _ended(daemon)
        (folder / "bare.sock").unlink(missing_ok=True)


def _sends(stdin: asyncio.StreamWriter) -> Callable[[bytes], Awaitable[None]]:
    async def send(data: bytes) -> None:
        stdin.write(data)
        await stdin.drain()

    return send


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _daemon(way: str, place: Path, folder: Path) -> asyncio.subprocess.Process:
    cache = "cache=always,writeback" if "always" in way else "cache=auto"
    process = await asyncio.create_subprocess_exec(
        VIRTIOFSD, "-f", f"--socket-path={folder}/bare.sock", "-o", f"source={place},{cache},xattr,killpriv_v2",
        stderr=asyncio.subprocess.DEVNULL)
    while not (folder / "bare.sock").exists():      # noqa: ASYNC110  it says nothing when it listens
        await asyncio.sleep(0.01)
    return process


def _qemu(way: str, place: Path, folder: Path, memory: int, kernel: Path, initrd: Path) -> list[str]:
    devices: Mapping[str, list[str]] = {
        "disk": ["-drive", f"if=none,id=d,format=raw,file={place},aio={aio.choose(QEMU)}",
                 "-device", "virtio-blk-device,drive=d"],
        "virtio-fs": ["-chardev", f"socket,id=c,path={folder}/bare.sock",
                      "-device", "vhost-user-fs-device,chardev=c,tag=fs,queue-size=1024"],
        "9p": ["-fsdev", f"local,id=f,path={place},security_model=none",
               "-device", "virtio-9p-device,fsdev=f,mount_tag=fs"],
    }  # fmt: skip
    backend = json.dumps({"qom-type": "memory-backend-memfd", "id": "ram", "size": memory << 20, "share": True})
    # Only for a daemon that has to map it: other memory can be of huge pages.
    shared, of_it = (["-object", backend], ",memory-backend=ram") if way.startswith("virtio-fs") else ([], "")
    return [
        str(QEMU), "-nodefaults", "-display", "none", "-no-reboot", "-m", str(memory), *shared,
        "-machine", f"microvm,acpi=off,rtc=on,x-option-roms=off{of_it}", "-accel", "tcg,tb-size=64",
        "-cpu", "max,-erms,-fsrm", "-global", "virtio-mmio.force-legacy=false", "-bios", "qboot.rom",
        "-kernel", str(kernel), "-initrd", str(initrd), "-serial", "stdio", *devices[way.partition(",")[0]],
        "-append", f"console=ttyS0 loglevel=3 panic=-1 reboot=t tsc=reliable tsc_early_khz={tsc_khz()} acpi=off",
    ]  # fmt: skip


def is_possible() -> bool:
    """Whether this machine has what it takes."""
    return os.access(VIRTIOFSD, os.X_OK) and QEMU.is_absolute()
