"""Files between host and container, beside bytes over a bare virtio-serial port of a machine of the same make.

The floor is a guest with the same kernel and command line, whose ``/init`` reads or writes its end of the agent's port
and does nothing else; the host's end is plain system calls on the socket. They are measured in turns. Where a file goes
there is none before, on either side: to free the memory of an old one takes 30 ms, and no port does that. The streams
of a command beside them show what the agent costs, and two more rows what it takes the guest, which has one CPU for all
of this, to write and to read such a file without any host. The host's files are in memory: its disk may be slower than
a port.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

import pykata
from benchmarks._table import Row, interleaved, main, note, row
from pykata.guest.cpio import directory, newc, program
from pykata.hypervisors.qemu import QEMU
from pykata.spec import VMSpec
from pykata.transport import connect

MIB = 1024 * 1024
SIZE = 256 * MIB
PIECE = 256 * 1024
SMALL = 100         # operations in one sample

INIT = r"""
#include <fcntl.h>
#include <sys/mount.h>
#include <unistd.h>
static char buffer[65536];
int main(void) {
    char command;
    mount("dev", "/dev", "devtmpfs", 0, 0);
    int port = open("/dev/vport0p1", O_RDWR);
    write(port, "+", 1);
    while (read(port, &command, 1) == 1) {
        long left = %d;
        while (left > 0) {
            long most = left < (long)sizeof buffer ? left : (long)sizeof buffer;
            long n = command == 'r' ? write(port, buffer, most) : read(port, buffer, most);
            if (n <= 0) break;
            left -= n;
        }
        if (command == 'w') write(port, "+", 1);
    }
    for (;;) pause();
}
""".replace("%d", str(SIZE))


def initrd(folder: Path) -> Path:
    """A RAM disk with the other end of the floor."""
    source, binary, ram_disk = folder / "init.c", folder / "init", folder / "initrd.cpio"
    source.write_text(INIT)
    subprocess.run(["gcc", "-static", "-O2", "-s", "-o", binary, source], check=True)
    ram_disk.write_bytes(newc([directory("dev"), program("init", binary.read_bytes())]))
    return ram_disk


@asynccontextmanager
async def bare_port(hypervisor: QEMU, folder: Path) -> AsyncIterator[socket.socket]:
    """The host's end of a port at whose other end bytes are taken and given."""
    ram_disk = await anyio.to_thread.run_sync(initrd, folder)
    async with hypervisor.transport(folder) as transport:
        spec = VMSpec(pykata.find_bundle().kernel, ram_disk, transport, cpus=1, memory=256)
        async with hypervisor.boot(spec, folder):
            port = await connect(transport)
            port.setblocking(True)
            await anyio.to_thread.run_sync(port.recv, 1)
            yield port


def take(port: socket.socket) -> float:
    """MB/s that the guest writes."""
    buffer, left, began = bytearray(PIECE), SIZE, time.perf_counter()
    port.send(b"r")
    while left:
        left -= port.recv_into(buffer, min(PIECE, left))
    return SIZE / 1e6 / (time.perf_counter() - began)


def give(port: socket.socket) -> float:
    """MB/s that the guest reads."""
    piece, began = bytes(PIECE), time.perf_counter()
    port.send(b"w")
    for _ in range(SIZE // PIECE):
        port.sendall(piece)
    port.recv(1)
    return SIZE / 1e6 / (time.perf_counter() - began)


async def measure(rounds: int) -> list[Row]:
    """Throughput both ways, and the time of small operations."""
    hypervisor = QEMU(machine="microvm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        local = Path(folder, "local")
        await anyio.Path(local).write_bytes(bytes(range(256)) * (SIZE // 256))
        async with (
            bare_port(hypervisor, Path(folder)) as port,
            pykata.Sandbox(hypervisor, isolation="emulated", memory="1G", disk="600M") as sandbox,
            sandbox.container("builtin:busybox") as box,
        ):

            async def up() -> float:
                await box.files.remove("/f", missing_ok=True)
                began = time.perf_counter()
                await box.files.upload(local, "/f")
                return SIZE / 1e6 / (time.perf_counter() - began)

            async def down() -> float:
                back = Path(folder, "back")
                await anyio.Path(back).unlink(missing_ok=True)
                began = time.perf_counter()
                await box.files.download("/f", back)
                return SIZE / 1e6 / (time.perf_counter() - began)

            async def bare_up() -> float:
                return await anyio.to_thread.run_sync(give, port)

            async def bare_down() -> float:
                return await anyio.to_thread.run_sync(take, port)

            async def stdout() -> float:
                began, left = time.perf_counter(), SIZE
                async with box.process(["cat", "/f"]) as process:
                    async for piece in process.stdout:
                        left -= len(piece)
                assert not left
                return SIZE / 1e6 / (time.perf_counter() - began)

            async def stdin() -> float:
                began, piece = time.perf_counter(), bytes(PIECE)
                async with box.process(["dd", "of=/dev/null", "bs=64k"]) as process:
                    for _ in range(SIZE // PIECE):
                        await process.stdin.send(piece)
                    await process.stdin.aclose()
                    assert await process.wait() == 0
                return SIZE / 1e6 / (time.perf_counter() - began)

            async def guest_writes() -> float:
                return await alone("dd if=/dev/zero of=/f bs=1M count=$1")

            async def guest_reads() -> float:
                return await alone("dd if=/f of=/dev/null bs=1M")

            async def alone(script: str) -> float:
                began = time.perf_counter()
                await box.run(["sh", "-c", f"exec {script} 2>/dev/null", "sh", str(SIZE // MIB)], check=True)
                return SIZE / 1e6 / (time.perf_counter() - began)

            async def small() -> float:
                began = time.perf_counter()
                for _ in range(SMALL):
                    await box.files.write_bytes("/small", b"x" * 100)
                    await box.files.read_bytes("/small")
                return (time.perf_counter() - began) * 1e3 / SMALL / 2

            samples = (bare_up, guest_writes, up, stdin, bare_down, guest_reads, down, stdout, small)
            await interleaved(1, *samples)
            floor_up, writes, ups, ins, floor_down, reads, downs, outs, smalls = await interleaved(rounds, *samples)
    note("files: the floor is a bare virtio-serial port; a ratio of throughputs is better the larger it is")
    return [
        row("upload of 256 MiB", "MB/s", ups, floor_up),
        row("  stdin of a command", "MB/s", ins, floor_up),
        row("  writing it in the guest alone", "MB/s", writes, floor_up),
        row("download of 256 MiB", "MB/s", downs, floor_down),
        row("  stdout of a command", "MB/s", outs, floor_down),
        row("  reading it in the guest alone", "MB/s", reads, floor_down),
        row("a small read or write", "ms", smalls),
    ]


if __name__ == "__main__":
    main(measure, rounds=5, about=__doc__)
