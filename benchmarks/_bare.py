"""QEMU and its file servers driven by hand, without pykata: the floor of what files in a guest can be."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

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
busybox --install -s /bin; export PATH=/bin; exec > /dev/ttyS0 2>&1
{mount} || echo FAILED
{before}; cd /m; echo BEGIN; read begin < /dev/ttyS0; {work}; echo END; cd /; umount /m; sync; reboot -f
"""


async def run(
    way: str, place: Path, before: str, work: str, folder: Path, *, begin: Callable[[], None], memory: int = 512
) -> str:
    """What ``work`` prints in a guest that has ``place``, an ext4 image or a directory, by this way at /m.

    Ahead of it the guest does what is ``before``, and then calls us: ``begin``.
    """
    bundle = find_bundle()
    busybox = shutil.which("busybox")
    assert busybox is not None
    initrd = folder / "bare.cpio"
    script = INIT.format(mount=MOUNTS[way], before=before, work=work)
    initrd.write_bytes(newc([
        *(directory(name) for name in ("dev", "proc", "bin", "m", "tmp")), character_device("dev/console", 5, 1),
        program("bin/busybox", Path(busybox).read_bytes()), program("init", script.encode()),  # noqa: ASYNC240
    ]))  # fmt: skip
    daemon = await _daemon(way, place, folder) if way.startswith("virtio-fs") else None
    try:
        argv = _qemu(way, place, folder, memory, bundle.kernel, initrd)
        process = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.PIPE,
                                                       stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        heard = b""
        while b"BEGIN" not in heard and (line := await process.stdout.readline()):
            heard += line
        begin()
        said = (heard + (await process.communicate(b"begin\n"))[0]).decode(errors="replace").replace("\r", "")
    finally:
        if daemon is not None and daemon.returncode is None:
            daemon.kill()
            await daemon.wait()
    assert "FAILED" not in said, said
    assert "END\n" in said, said
    return said.partition("BEGIN\n")[2].removeprefix("begin\n").partition("END\n")[0]


async def _daemon(way: str, place: Path, folder: Path) -> asyncio.subprocess.Process:
    cache = "cache=always,writeback" if "always" in way else "cache=auto"
    process = await asyncio.create_subprocess_exec(
        VIRTIOFSD, "-f", f"--socket-path={folder}/bare.sock", "-o", f"source={place},{cache},xattr",
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
