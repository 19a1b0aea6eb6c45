"""How fast the output of a command comes: 256 MiB of its stdout, taken in pieces.

The floor is what the bare virtio-serial port of such a machine moves: the same kernel and QEMU without an agent, where
a program writes as much in pieces of 32 KiB, which is what a port takes at once, and the host only receives it. Both
machines run during the whole measurement, and are measured in turns.
"""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path

import anyio

import pykata
from benchmarks._table import Row, interleaved, main, note, row
from pykata.hypervisors.qemu import QEMU
from tests.vm.qemu_guest import Guest, booted, initrd

SIZE = 256 * 1024 * 1024
PIECE = 32 * 1024
DD = f"dd if=/dev/zero bs={PIECE} count={SIZE // PIECE} 2>/dev/null"


def receive(sock: socket.socket) -> None:
    """Take ``SIZE`` bytes, and the shell's word on how it went."""
    space = bytearray(256 * 1024)
    sock.setblocking(True)
    left = SIZE + len(b"=0=\n")
    while left > 0:
        left -= sock.recv_into(space)
    sock.setblocking(False)


async def bare(guest: Guest) -> float:
    """Milliseconds in which the port alone moves that much."""
    began = time.perf_counter()
    guest.stream.send(DD.encode() + b"\n")
    await anyio.to_thread.run_sync(receive, guest.stream)
    return (time.perf_counter() - began) * 1000


async def output(container: pykata.Container) -> float:
    """The same for the stdout of a command."""
    began = time.perf_counter()
    left = SIZE
    async with container.process(["sh", "-c", f"exec {DD}"]) as process:
        async for piece in process.stdout:
            left -= len(piece)
        assert await process.wait() == 0
    assert left == 0
    return (time.perf_counter() - began) * 1000


async def collected(container: pykata.Container) -> float:
    """The same where ``run`` collects it."""
    began = time.perf_counter()
    done = await container.run(["sh", "-c", f"exec {DD}"], max_output=SIZE, check=True)
    assert len(done.stdout_bytes) == SIZE
    return (time.perf_counter() - began) * 1000


async def measure(rounds: int) -> list[Row]:
    """Rows for a stream, and for one that is collected."""
    with tempfile.TemporaryDirectory() as folder:
        ram_disk = initrd(Path(folder) / "initrd.cpio")
        async with (
            booted(QEMU(), pykata.find_bundle().kernel, ram_disk) as guest,
            pykata.Sandbox(QEMU(), isolation="emulated") as sandbox,
            sandbox.container("builtin:busybox") as container,
        ):
            samples = (lambda: bare(guest), lambda: output(container), lambda: collected(container))
            await interleaved(1, *samples)
            alone, streamed, kept = await interleaved(rounds, *samples)
    megabytes = SIZE / 1e3
    for name, values in (("bare port", alone), ("stdout", streamed), ("collected", kept)):
        note(f"{name}: {megabytes / sorted(values)[len(values) // 2]:.0f} MB/s")
    return [row("256 MiB of stdout", "ms", streamed, alone), row("256 MiB, collected", "ms", kept, alone)]


if __name__ == "__main__":
    main(measure, rounds=7, about=__doc__)
