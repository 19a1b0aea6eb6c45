"""A process by the names of asyncio.subprocess, and what may be written to one."""

from __future__ import annotations

import asyncio
import signal
from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import anyio
import pytest

from pykata import ConfigError, Sandbox, SandboxClosedError
from pykata.buffers import bytes_of
from pykata.streams import MAX_WRITTEN
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess
from tests.settling import settled

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"
GUARD = 300.0    # seconds; only a hang takes that long


async def deaf(process: FakeProcess) -> int:
    """Never reads."""
    await process.write(b"ready\n")
    await anyio.sleep_forever()
    return 0


async def late(process: FakeProcess) -> int:
    """Writes more than fits before it reads anything, to both streams."""
    for _ in range(40):
        await process.write(bytes(64 * 1024))
        await process.write_error(b"." * 64 * 1024)
    size = 0
    while data := await process.read():
        size += len(data)
    await process.write(b"%d" % size)
    return 0


async def words(process: FakeProcess) -> int:
    await process.write(b"one\ntwo;th")
    await process.write(b"ree;last")
    return 0


async def exhausted(process: FakeProcess) -> int:
    process.kill(signal.SIGKILL, oom=True)
    await anyio.sleep_forever()
    return 0


COMMANDS = {"deaf": deaf, "late": late, "words": words, "exhausted": exhausted}


@pytest.fixture
async def sb() -> AsyncIterator[Sandbox]:
    with anyio.fail_after(GUARD):
        async with Sandbox(FakeHypervisor(commands=COMMANDS), FakeFs()) as sandbox:
            yield sandbox


# --- what can be written ---


@pytest.mark.parametrize(
    "data",
    [
        array("i", [1, 2, 3]), memoryview(array("d", [1.5])), memoryview(b"abcdef")[::2], bytearray(b"xy"),
        memoryview(array("i", range(6))).cast("B").cast("i", (2, 3)), memoryview(array("h", range(6)))[::-1], b"",
        array("q", range(100_000)),
    ],
)  # fmt: skip
async def test_buffers_of_any_kind(sb: Sandbox, data: bytes) -> None:
    expected = memoryview(data).tobytes()
    async with sb.container(BUSYBOX) as box:
        async with box.process(["cat"]) as process:
            assert await process.communicate(data) == (expected, b"")
        assert await box.files.write_bytes("/f", data) == len(expected)
        assert await box.files.read_bytes("/f") == expected
        async with box.files.open("/g", "wb") as file:
            assert await file.write(data) == len(expected)
        assert await box.files.read_bytes("/g") == expected
        assert (await box.run(["echo", "after"])).stdout == "after\n"


def released() -> memoryview:
    view = memoryview(b"x")
    view.release()
    return view


@pytest.mark.parametrize("data", ["text", 3, None, [1], released()])
async def test_what_is_no_buffer_is_refused(sb: Sandbox, data: bytes) -> None:
    async with sb.process(BUSYBOX, ["cat"]) as process:
        with pytest.raises(ConfigError, match="data="):
            await process.stdin.send(data)
        with pytest.raises(ConfigError, match="data="):
            process.stdin.write(data)
        assert await process.communicate(b"after") == (b"after", b"")


def test_text_is_to_be_encoded() -> None:
    with pytest.raises(ConfigError) as refused:
        bytes_of("text")
    assert refused.value.hint == "data.encode() makes bytes of it"


# --- the writer ---


async def test_a_writer(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["cat"]) as process:
        process.stdin.write(b"without ")
        process.stdin.writelines([b"wait", b"ing\n"])
        assert await process.stdout.readline() == b"without waiting\n"
        process.stdin.write(b"x" * 300_000)
        assert not process.stdin.is_closing()
        process.stdin.write_eof()
        assert process.stdin.is_closing()
        # What there was no room for goes out as the process reads.
        assert await process.stdout.readexactly(300_000) == b"x" * 300_000
        assert await process.stdout.read() == b""
        await process.stdin.wait_closed()
        assert await process.wait() == 0
        process.stdin.write(b"too late")
        await process.stdin.drain()


async def test_a_reader_that_waits_already_gets_what_is_written_later(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["cat"]) as process, anyio.create_task_group() as tasks:
        got: list[bytes] = []

        async def read() -> None:
            got.append(await process.stdout.readexactly(500_000))

        tasks.start_soon(read)
        await settled()
        process.stdin.write(b"y" * 500_000)
        process.stdin.close()
    assert got == [b"y" * 500_000]


async def test_what_waits_is_bounded(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["deaf"]) as process:
        process.stdin.write(bytes(3 * MAX_WRITTEN))
        with pytest.raises(ConfigError, match="wait for the process"):
            process.stdin.write(b"more")
        draining = asyncio.create_task(process.stdin.drain())
        await settled()
        assert not draining.done()
        draining.cancel()
        await asyncio.wait([draining])
        await process.kill()
        assert await process.wait() == 128 + signal.SIGKILL
        await process.stdin.drain()     # nobody reads it any more


async def test_a_drain_that_is_cancelled_loses_nothing(sb: Sandbox) -> None:
    data = bytes(range(256)) * 4000
    async with sb.process(BUSYBOX, ["cat"]) as process:
        process.stdin.write(data)
        draining = asyncio.create_task(process.stdin.drain())
        await settled()
        draining.cancel()
        await asyncio.wait([draining])
        process.stdin.write(b"the end")
        assert await process.communicate() == (data + b"the end", b"")


# --- the reader ---


async def test_a_reader(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["words"]) as process:
        assert not process.stdout.at_eof()
        assert await process.stdout.read(0) == b""
        assert await process.stdout.read(2) == b"on"
        assert await process.stdout.readline() == b"e\n"
        assert await process.stdout.readuntil(b";") == b"two;"
        assert await process.stdout.readexactly(3) == b"thr"
        with pytest.raises(ConfigError):
            await process.stdout.readuntil(b"")
        with pytest.raises(ConfigError):
            await process.stdout.readexactly(-1)
        assert await process.stdout.readuntil(b"e;") == b"ee;"
        with pytest.raises(asyncio.IncompleteReadError) as short:
            await process.stdout.readexactly(10)
        assert short.value.partial == b"last"
        with pytest.raises(asyncio.IncompleteReadError):
            await process.stdout.readuntil(b";")
        assert await process.stdout.read(5) == await process.stdout.readline() == b""
        assert process.stdout.at_eof()


async def test_a_separator_that_does_not_come(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["late"]) as process:
        with pytest.raises(asyncio.LimitOverrunError):
            await process.stdout.readuntil(b"x")
        assert await process.stdout.readexactly(100_000) == bytes(100_000)


async def test_communicate_takes_both_streams(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["late"]) as process:
        out, err = await process.communicate(b"i" * 200_000)
        assert (len(out), len(err)) == (40 * 65536 + 6, 40 * 65536)
        assert out.endswith(b"200000")
        assert process.returncode == 0


async def test_communicate_after_the_end_has_what_nobody_took(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["words"]) as process:
        assert await process.wait() == 0
        assert await process.communicate() == (b"one\ntwo;three;last", b"")


async def test_nothing_is_written_after_the_end(sb: Sandbox) -> None:
    data = bytes(1_000_000)
    async with sb.process(BUSYBOX, ["cat"]) as process:
        process.stdin.write(data)
        process.stdin.close()
        process.stdin.write(b"after")
        assert await process.stdout.read() == data


# --- ends ---


async def test_reasons(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["false"]) as process:
        assert (process.reason, process.signal) == (None, None)
        await process.wait()
    assert (process.returncode, process.reason, process.signal) == (1, "exit", None)
    async with sb.process(BUSYBOX, ["sleep", "infinity"]) as process:
        await process.terminate()
        await process.wait()
    assert (process.reason, process.signal) == ("signal", signal.SIGTERM)
    async with sb.process(BUSYBOX, ["exhausted"]) as process:
        await process.wait()
    assert (process.reason, process.signal) == ("oom", signal.SIGKILL)
    async with sb.process(BUSYBOX, ["sleep", "infinity"]) as process:
        pass
    assert (process.reason, process.returncode) == (None, None)


async def test_reasons_in_the_background(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as box:
        job = await box.start(["sleep", "infinity"])
        assert (job.reason, job.signal) == (None, None)
        with pytest.raises(ConfigError):
            await job.send_signal("TERM")  # type: ignore[arg-type]
        await job.terminate()
        await job.wait()
        assert (job.reason, job.signal) == ("signal", signal.SIGTERM)


async def test_who_reads_in_the_background_when_the_block_is_left(sb: Sandbox) -> None:
    raised: list[BaseException] = []

    async def read() -> None:
        try:
            await process.stdout.read()
        except SandboxClosedError as closed:
            raised.append(closed)

    async with AsyncExitStack() as block:
        process = await block.enter_async_context(sb.process(BUSYBOX, ["deaf"]))
        reading = asyncio.create_task(read())
        await settled()
    await reading
    assert len(raised) == 1
    assert (await sb.run(BUSYBOX, ["echo", "after"])).stdout == "after\n"
