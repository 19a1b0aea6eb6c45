"""The streams of a process over fakes: lines, windows of their own, ends of their own; terminals and limits."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata import ConfigError, Process, Sandbox, Terminal
from pykata.agent import v1
from pykata.requests import WINDOW
from pykata.streams import Output
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess, FakeVM
from tests.settling import settled

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"
PIECE = 64 * 1024
MUCH = 4 * WINDOW


async def noisy(process: FakeProcess) -> int:
    """Fills stderr for ever, and meanwhile writes much to stdout."""
    async with anyio.create_task_group() as group:
        group.start_soon(process.write_error, bytes(100 * WINDOW))
        for _ in range(MUCH // PIECE):
            await process.write(bytes(PIECE))
        await process.close_output()
        await anyio.sleep_forever()
    return 0


async def stubborn_cat(process: FakeProcess) -> int:
    """Writes much before it reads anything, and then what it reads."""
    await process.write(bytes(MUCH))
    while data := await process.read():
        await process.write(data)
    return 0


async def watches(process: FakeProcess) -> int:
    """Says the size of its terminal whenever it reads something."""
    await process.write_error(b"to stderr\n")
    while await process.read():
        assert process.terminal is not None
        await process.write(b"%d %d %d\n" % (process.terminal.rows, process.terminal.cols, sum(process.signals)))
    return 0


async def limits(process: FakeProcess) -> int:
    await process.write(repr(dict(process.rlimits)).encode())
    return 0


COMMANDS = {"noisy": noisy, "stubborn": stubborn_cat, "watches": watches, "limits": limits}


@pytest.fixture
def hypervisor() -> FakeHypervisor:
    return FakeHypervisor(commands=COMMANDS)


@pytest.fixture
async def sb(hypervisor: FakeHypervisor) -> AsyncIterator[Sandbox]:
    async with Sandbox(hypervisor, FakeFs()) as sandbox:
        yield sandbox


@pytest.fixture
def vm(sb: Sandbox, hypervisor: FakeHypervisor) -> FakeVM:
    return hypervisor.machines[-1]


# --- windows ---


async def test_who_reads_stdout_gets_it_all_while_stderr_is_stuck(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["noisy"]) as process:
        assert len(await process.stdout.read()) == MUCH, "and its end, too"
        assert process.returncode is None
        assert sum(len(piece) for piece in iter(process.stderr.take, b"")) == WINDOW


async def test_input_does_not_hold_up_what_makes_room_for_output(sb: Sandbox) -> None:
    data = bytes(range(256)) * 8192
    got: dict[str, bytes] = {}

    async def read(process: Process) -> None:
        got["stdout"] = await process.stdout.read()

    async with sb.process(BUSYBOX, ["stubborn"]) as process, anyio.create_task_group() as group:
        group.start_soon(read, process)
        await process.stdin.send(data)
        await process.stdin.aclose()
    assert got["stdout"] == bytes(MUCH) + data


async def test_input_waits_with_the_sender(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["sleep", "infinity"]) as process:
        sending = asyncio.create_task(process.stdin.send(bytes(MUCH)))
        await settled()
        assert not sending.done()
        await process.kill()
        assert await process.wait() == 137
        await sending       # whom it was for is gone, which is no error


# --- lines ---


class Pieces:
    """A process that writes these pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.taken = 0
        self.stdout = Output(self, self.took)

    @property
    def ended(self) -> bool:
        return not self.pieces

    def took(self, size: int) -> None:
        self.taken += size

    async def advance(self, enough: Callable[[], bool]) -> None:
        await asyncio.sleep(0)
        if self.pieces:
            self.stdout.put(self.pieces.pop(0))


few_bytes = st.lists(st.sampled_from([b"\n", b"a", b"b", b"\r", b"\n\n"]), min_size=1, max_size=12).map(b"".join)


@given(st.lists(few_bytes, max_size=8), st.integers(1, 12))
def test_lines(pieces: list[bytes], limit: int) -> None:
    whole = b"".join(pieces)
    source = Pieces(list(pieces))

    async def read() -> list[bytes]:
        return [line async for line in source.stdout.lines(limit)]

    lines = asyncio.run(read())
    assert b"".join(lines) == whole
    assert source.taken == len(whole)
    assert all(len(line) <= limit for line in lines)
    assert all(line.endswith(b"\n") or len(line) == limit for line in lines[:-1])
    assert all(line.count(b"\n") <= 1 for line in lines)


@given(st.lists(few_bytes, max_size=8), st.lists(st.sampled_from(["line", "piece", "cancel"]), max_size=30))
def test_ways_to_read_can_be_mixed_and_cancelled(pieces: list[bytes], ways: list[str]) -> None:
    source = Pieces(list(pieces))
    got = bytearray()

    async def one(way: str) -> bytes:
        output: Any = source.stdout if way == "piece" else source.stdout.lines()
        return await anext(output, b"")

    async def read() -> None:
        for way in ways:
            task = asyncio.create_task(one(way))
            if way == "cancel":
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            got.extend(b"" if task.cancelled() else await task)
        got.extend(await source.stdout.read())

    asyncio.run(read())
    assert bytes(got) == b"".join(pieces)


@pytest.mark.parametrize("limit", [0, -1, True, "x"])
def test_a_limit_that_is_none(limit: Any) -> None:
    with pytest.raises(ConfigError, match="limit"):
        Pieces([]).stdout.lines(limit)


# --- terminals and limits ---


async def test_a_terminal_is_asked_for_and_resized(sb: Sandbox, vm: FakeVM) -> None:
    async with sb.process(BUSYBOX, ["watches"], tty=Terminal(rows=50, cols=132)) as process:
        assert process.tty
        assert await anext(process.stdout) == b"to stderr\n"
        assert await process.stderr.read() == b"", "it has none"
        await process.stdin.send(b"?")
        assert await anext(process.stdout) == b"50 132 0\n"
        await process.resize(1, 65535)
        await process.stdin.send(b"?")
        assert await anext(process.stdout) == b"1 65535 %d\n" % signal.SIGWINCH
        await process.stdin.aclose()
        await process.wait()
        await process.resize(2, 2)
    await process.resize(2, 2)
    assert sum(isinstance(request, v1.ResizeRequest) for request in vm.agent.requests) == 1


async def test_true_is_a_terminal_of_the_usual_size(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, ["watches"], tty=True, input=b"?")
    assert done.stdout == "to stderr\n24 80 0\n"


async def test_a_process_without_a_terminal_has_no_size(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["cat"]) as process:
        with pytest.raises(ConfigError, match="'cat' has no terminal"):
            await process.resize(10, 10)
        with pytest.raises(ConfigError, match="rows=0"):
            await process.resize(0, 10)


async def test_limits_arrive(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, ["limits"], rlimits={"nofile": 10, "core": (0, -1)})
    assert done.stdout == repr({"RLIMIT_NOFILE": (10, 10), "RLIMIT_CORE": (0, 2**64 - 1)})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tty": "yes"}, "tty='yes'"),
        ({"tty": Terminal(rows=0)}, "rows=0"),
        ({"tty": Terminal(cols=70_000)}, "cols=70000"),
        ({"rlimits": {"files": 1}}, "'files' that doesn't exist"),
        ({"rlimits": {"nofile": "many"}}, "'many' is not a limit"),
        ({"rlimits": {"nofile": (2, 1)}}, "above the hard one"),
        ({"rlimits": {"nofile": (-1, 1)}}, "above the hard one"),
        ({"rlimits": ["nofile"]}, "not a mapping"),
    ],
)
async def test_what_cannot_be_right_is_named(sb: Sandbox, vm: FakeVM, options: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        await sb.run(BUSYBOX, ["true"], **options)
    assert vm.agent.containers == {}
    assert not any(isinstance(request, v1.RunRequest) for request in vm.agent.requests)


async def test_shell_scripts_are_apart_from_argv(sb: Sandbox, vm: FakeVM) -> None:
    await sb.shell(BUSYBOX, "a && b")
    async with sb.container(BUSYBOX) as container:
        await container.shell("c | d", env={"A": "b"})
    starts = [request.start for request in vm.agent.requests if isinstance(request, v1.RunRequest)]
    processes = [start.process for start in starts if start is not None and start.process is not None]
    assert [process.args for process in processes] == [["/bin/sh", "-c", "a && b"], ["/bin/sh", "-c", "c | d"]]
    with pytest.raises(ConfigError, match="script"):
        await sb.shell(BUSYBOX, ["a"])  # type: ignore[arg-type]
