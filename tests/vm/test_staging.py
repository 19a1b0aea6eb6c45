"""Much data on its way into a real guest: by a disk slot that nobody needs, and by the port where there is none."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest

from pykata import Container, Process, Sandbox
from pykata.agent import bulk, staging
from pykata.agent.staging import LEAST, MUCH, PIECE
from pykata.hypervisors.qemu import QEMU
from pykata.spec import Disk
from tests.cancellation import Way, cancel_everywhere
from tests.vm.conftest import BUSYBOX

SUM = ["sha256sum"]
PIPE = 1024 * 1024      # bytes of one that carries much
NOISE = random.Random(1).randbytes(8 * 1024 * 1024)
GUARD = 300.0       # seconds; only a hang takes that long


@pytest.fixture(autouse=True)
def staged(monkeypatch: pytest.MonkeyPatch) -> Counter[staging.Staging]:
    """How many pieces went beside the port, by sandbox. A slot that was wanted back is looked for at once."""
    monkeypatch.setattr(staging, "RETRY", 0.0)
    pieces: Counter[staging.Staging] = Counter()
    send = staging.Staging.send

    def counted(self: staging.Staging, call: int, data: memoryview) -> staging.Piece | None:
        piece = send(self, call, data)
        pieces[self] += piece is not None
        return piece

    monkeypatch.setattr(staging.Staging, "send", counted)
    return pieces


def sandbox(**options: object) -> Sandbox:
    return Sandbox(isolation="emulated", **options)  # type: ignore[arg-type]


def way(sb: Sandbox) -> staging.Staging:
    found = sb._open.agent._channel.staging
    assert found is not None
    return found


async def until(there: Callable[[], bool]) -> None:
    with anyio.fail_after(GUARD):
        while not there():
            await anyio.lowlevel.checkpoint()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def said(process: Process) -> str:
    """What sha256sum says."""
    return (await process.stdout.read()).split()[0].decode()


async def box_sum(sb: Sandbox) -> str:
    """What it says of all the noise."""
    return (await sb.run(BUSYBOX, SUM, input=NOISE, check=True)).stdout.split()[0]


async def opened(sb: Sandbox, process: Process) -> int:
    """Send as much as it takes to have a slot borrowed; how much."""
    sent = MUCH + 1
    await process.stdin.send(NOISE[:sent])
    with anyio.fail_after(GUARD):
        while not way(sb).is_open:
            if way(sb)._task is None:       # nobody tries: with this byte somebody does
                await process.stdin.send(NOISE[sent : sent + 1])
                sent += 1
            await anyio.lowlevel.checkpoint()
    return sent


def pieces(sb: Sandbox) -> staging.Pieces:
    found = way(sb)._pieces
    assert found is not None
    return found


async def test_sizes_around_the_borders(sb: Sandbox, staged: Counter[staging.Staging]) -> None:
    async with sb.container(BUSYBOX) as box, box.process(SUM) as process:
        at = await opened(sb, process)
        sizes = (1, 4095, 4096, 4097, LEAST - 1, LEAST, LEAST + 1, PIECE - 1, PIECE, PIECE + 1, 1_000_001, 2_000_000)
        for size in sizes:
            await process.stdin.send(NOISE[at : at + size])
            at += size
        assert staged[way(sb)] >= 8
        await process.stdin.aclose()
        assert await said(process) == digest(NOISE[:at])


async def test_several_at_once_beside_one_that_does_not_read(sb: Sandbox) -> None:
    async def feed(box: Container, number: int) -> None:
        data = NOISE[number:] + NOISE[:number]
        done = await box.run(SUM, input=data, check=True)
        assert done.stdout.split()[0] == digest(data)

    async with sb.container(BUSYBOX) as box, sb.container(BUSYBOX) as other, box.process(["sleep", "1000"]) as stalled:
        async with anyio.create_task_group() as stalling:
            stalling.start_soon(stalled.stdin.send, NOISE)          # which it never reads
            async with anyio.create_task_group() as tasks:
                for number in range(4):
                    tasks.start_soon(feed, (box, other)[number % 2], 1000 * number)
            await stalled.kill()
        assert await stalled.wait() == 137


async def test_one_that_stops_reading_after_much_holds_no_more_than_another(sb: Sandbox) -> None:
    """A pipe, and what of it waits in the host's memory: not what it would take if it still read."""
    reads = 6_000_000
    script = f"head -c {reads} >/dev/null; sleep 1000"
    async with sb.container(BUSYBOX) as box, box.process(["sh", "-c", script]) as process:
        await opened(sb, process)
        stream = process.stdin._stream
        while stream._stdin_taken < reads or stream.stdin_room:
            await process.stdin._send_some(memoryview(NOISE)[:PIECE])
        assert stream._stdin_sent <= reads + PIPE + staging.AHEAD + bulk.STDIN_SAID + PIECE
        assert (await box_sum(sb)) == digest(NOISE)


async def test_a_process_that_is_left_gives_its_pieces_back(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as box, box.process(["cat"]) as other:
        await opened(sb, other)
        for _ in range(6):        # more than there are pieces
            async with box.process(["sh", "-c", "head -c 2500000 >/dev/null; sleep 1000"]) as process:
                while process.stdin._stream.stdin_room or process.stdin._stream._stdin_sent < 2_500_000:
                    if await process.stdin._send_some(memoryview(NOISE)[:PIECE]):
                        continue
            await until(lambda: len(pieces(sb).free) >= staging.PIECES - 2)
    assert (await box_sum(sb)) == digest(NOISE)


async def test_an_image_that_waits_gets_the_slot(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    async with (
        sandbox(hypervisor=QEMU(accel="tcg", disk_slots=2)) as sb,
        sb.container(BUSYBOX) as box, box.process(SUM) as process,
    ):  # fmt: skip
        at = await opened(sb, process)
        async with sb._open.vm.plug(Disk("image", image)) as serial, anyio.create_task_group() as tasks:
            assert serial == "slot1"
            assert not way(sb).is_open
            tasks.start_soon(process.stdin.send, NOISE[at:])
        await process.stdin.aclose()
        assert await said(process) == digest(NOISE)


async def test_without_a_free_slot_it_goes_by_the_port(staged: Counter[staging.Staging]) -> None:
    async with sandbox(hypervisor=QEMU(accel="tcg", disk_slots=1)) as sb:
        assert await box_sum(sb) == digest(NOISE)
        assert not staged[way(sb)]


async def test_a_fork_in_the_middle_of_an_upload(tmp_path: Path, staged: Counter[staging.Staging]) -> None:
    local = tmp_path / "local"
    local.write_bytes(NOISE)
    async with (
        sandbox() as parent, parent.container(BUSYBOX) as box, box.process(SUM) as process, AsyncExitStack() as stack,
    ):  # fmt: skip
        at = await opened(parent, process)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.stdin.send, NOISE[at:])
            tasks.start_soon(box.files.upload, local, "/uploaded")
            await until(lambda: staged[way(parent)] > 4)
            (child,) = await parent.fork()
        await process.stdin.aclose()
        assert await said(process) == digest(NOISE)
        assert (await box.run(["sha256sum", "/uploaded"])).stdout.split()[0] == digest(NOISE)
        await stack.enter_async_context(child)
        inside = child.containers[box.id]
        # Its slots are its own: both go on.
        for there in (box, inside):
            await there.files.upload(local, "/again")
            assert (await there.run(["sha256sum", "/again"])).stdout.split()[0] == digest(NOISE)


async def test_a_pause_takes_none(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as box, box.process(SUM) as process:
        at = await opened(sb, process)
        await sb.pause()
        assert not way(sb).is_open
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.stdin.send, NOISE[at:])
            await sb.resume()
        await process.stdin.aclose()
        assert await said(process) == digest(NOISE)


async def test_cancelled_anywhere_it_leaves_nothing(sb: Sandbox, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(NOISE[: 4 * MUCH])
    async with sb.container(BUSYBOX) as box:
        async def work() -> None:
            await box.files.upload(local, "/uploaded")

        async def unchanged(n: int, how: Way) -> None:
            where = f"cancelled at suspension {n} ({how})"
            await until(lambda: way(sb)._task is None)      # a call is left before the slot is given back
            assert len(os.listdir("/proc/self/fd")) == before, where

        await work()
        await until(lambda: way(sb)._task is None)
        before = len(os.listdir("/proc/self/fd"))
        assert await cancel_everywhere(work, unchanged, step=9) > 8
