"""Every call, against the agent in memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from pykata.agent.client import AgentClient, Exited, OutputEvent, RunStream, Scope, Stderr, Stdout, connect
from pykata.agent.v1 import CreateContainerRequest, Mount, Process, Rootfs, SetupRequest, Start
from pykata.errors import AgentLostError, AgentRefusedError, ConfigError
from pykata.testing import Command, FakeAgent, FakeProcess
from tests.settling import settled

GUARD = 300.0    # seconds; only a hang takes that long
ROOTFS = Rootfs(lowers=[Mount(disk_serial="d1", type="squashfs")])


@asynccontextmanager
async def guest(**commands: Command) -> AsyncIterator[tuple[FakeAgent, AgentClient]]:
    """An agent that was set up, with a container ``c``."""
    fake = FakeAgent(commands)
    with anyio.fail_after(GUARD):
        async with fake.connected() as sock, connect(sock) as agent:
            await agent.setup(SetupRequest(hostname="guest"))
            await agent.create_container(CreateContainerRequest(id="c", rootfs=ROOTFS))
            yield fake, agent


def start(*args: str, container: str = "c", process: str = "p") -> Start:
    return Start(container_id=container, process=Process(id=process, args=list(args)))


async def collect(command: RunStream) -> list[OutputEvent]:
    return [event async for event in command]


async def test_setup() -> None:
    fake = FakeAgent()
    async with fake.connected() as sock, connect(sock) as agent:
        with pytest.raises(AgentRefusedError) as raised:
            await agent.stats()
        assert raised.value.status == "FAILED_PRECONDITION"
        before = time.time_ns()
        answer = await agent.setup(SetupRequest(hostname="guest", unix_time_ns=1))
        assert answer.agent_version
        assert fake.setup is not None
        assert before <= fake.setup.unix_time_ns <= time.time_ns()
        assert len(fake.setup.entropy) == 64
        with pytest.raises(AgentRefusedError):
            await agent.setup(SetupRequest(hostname="guest"))


async def test_containers() -> None:
    async with guest() as (fake, agent):
        assert set(fake.containers) == {"c"}
        with pytest.raises(AgentRefusedError) as raised:
            await agent.create_container(CreateContainerRequest(id="c", rootfs=ROOTFS))
        assert raised.value.status == "ALREADY_EXISTS"
        with pytest.raises(AgentRefusedError, match="id: 'no such name'"):
            await agent.create_container(CreateContainerRequest(id="no such name", rootfs=ROOTFS))
        stats = await agent.stats()
        assert stats.containers["c"].pids == 1
        await agent.remove_container("c")
        await agent.remove_container("c")
        assert fake.containers == {}


async def test_run() -> None:
    async with guest() as (_, agent), agent.run(start("echo", "hello", "world")) as command:
        assert await command.started() == 2
        assert await command.started() == 2
        assert await collect(command) == [Stdout(b"hello world\n"), Exited(0)]
        assert await collect(command) == []
        await command.finished()


async def test_run_in_a_container_of_its_own() -> None:
    async with guest() as (fake, agent):
        one = start("true", container="own")
        one.create = CreateContainerRequest(id="own", rootfs=ROOTFS)
        async with agent.run(one) as command:
            await command.started()
            assert await collect(command) == [Exited(0)]
            await command.finished()
            assert set(fake.containers) == {"c"}


@pytest.mark.parametrize(("args", "events"), [
    (("false",), [Exited(1)]),
    (("nonsense",), [Stderr(b"nonsense: not found\n"), Exited(127)]),
    (("/bin/echo",), [Stdout(b"\n"), Exited(0)]),
])  # fmt: skip
async def test_ends(args: tuple[str, ...], events: list[OutputEvent]) -> None:
    async with guest() as (_, agent), agent.run(start(*args)) as command:
        assert await collect(command) == events


@pytest.mark.parametrize(("request_", "status"), [
    (start("true", container="none"), "NOT_FOUND"),
    (start("true", process="No Such Id"), "INVALID_ARGUMENT"),
    (start(), "INVALID_ARGUMENT"),
    (Start(), "INVALID_ARGUMENT"),
])  # fmt: skip
async def test_refused_run(request_: Start, status: str) -> None:
    async with guest() as (_, agent), agent.run(request_) as command:
        with pytest.raises(AgentRefusedError) as raised:
            await command.started()
        assert raised.value.status == status


async def test_request_that_is_too_large() -> None:
    async with guest() as (_, agent):
        with pytest.raises(ConfigError, match="4194304"):
            async with agent.run(start("echo", "x" * 5_000_000)):
                pytest.fail("it was sent")
        async with agent.run(start("true", "x" * 4_000_000)) as command:
            assert await collect(command) == [Exited(0)]


async def test_stdin() -> None:
    sent = os.urandom(3_000_000)
    got = bytearray()

    async with guest() as (_, agent), agent.run(start("cat")) as command, anyio.create_task_group() as group:

        async def feed() -> None:
            await command.send_stdin(sent[:1_000_000])
            await command.send_stdin(b"")
            await command.send_stdin(sent[1_000_000:])
            await command.close_stdin()
            await command.close_stdin()
            await command.send_stdin(b"too late, and no error")

        group.start_soon(feed)
        async for event in command:
            if isinstance(event, Stdout):
                got += event.data
        await command.finished()
    assert got == sent


async def test_stdin_that_nobody_reads() -> None:
    async with guest() as (_, agent), agent.run(start("true")) as command:
        assert await collect(command) == [Exited(0)]
        await command.send_stdin(bytes(5_000_000))
        await command.close_stdin()
        await command.finished()


async def test_stdin_cut_off_goes_on_where_it_was() -> None:
    """A send that is cancelled has sent whole pieces, so that what comes after it is understood."""
    go = anyio.Event()

    async def late_cat(process: FakeProcess) -> int:
        await go.wait()
        while data := await process.read():
            await process.write(data)
        return 0

    got = bytearray()
    async with guest(late=late_cat) as (_, agent), agent.run(start("late")) as command:
        await command.started()
        async with anyio.create_task_group() as group:
            group.start_soon(command.send_stdin, b"a" * 5_000_000)
            await settled()
            group.cancel_scope.cancel()
        go.set()

        async def feed() -> None:
            await command.send_stdin(b"b" * 100_000)
            await command.close_stdin()

        async with anyio.create_task_group() as group:
            group.start_soon(feed)
            async for event in command:
                if isinstance(event, Stdout):
                    got += event.data
        assert event == Exited(0)
    assert got == b"a" * (len(got) - 100_000) + b"b" * 100_000
    assert 300_000 < len(got) < 5_000_000


async def test_signals() -> None:
    async def stubborn(process: FakeProcess) -> int:
        process.ignores.add(signal.SIGTERM)
        await process.write(b"ready")
        await anyio.sleep_forever()
        return 0

    async with guest(stubborn=stubborn) as (_, agent), agent.run(start("stubborn")) as command:
        assert await anext(command) == Stdout(b"ready")
        await agent.signal("c", "p", signal.SIGTERM)
        await agent.signal("c", "p", 0)
        with pytest.raises(AgentRefusedError):
            await agent.signal("c", "p", signal.SIGTERM, Scope.TREE)
        await agent.signal("c", "p", signal.SIGKILL, Scope.TREE)
        assert await collect(command) == [Exited(137, 9)]
        await command.finished()
        with pytest.raises(AgentRefusedError) as raised:
            await agent.signal("c", "p", signal.SIGTERM)
        assert raised.value.status == "NOT_FOUND"


async def test_leaving_kills() -> None:
    ended = anyio.Event()

    async def endless(process: FakeProcess) -> int:
        try:
            while True:
                await process.write(bytes(100_000))
        finally:
            ended.set()

    async with guest(endless=endless) as (fake, agent):
        async with agent.run(start("endless")) as command:
            await anext(command)
        await ended.wait()
        assert set(fake.containers) == {"c"}
        await agent.stats()


async def test_leaving_after_stdin_was_closed_kills() -> None:
    ended = anyio.Event()

    async def endless(process: FakeProcess) -> int:
        try:
            assert await process.read() == b""
            await anyio.sleep_forever()
        finally:
            ended.set()
        return 0

    async with guest(endless=endless) as (_, agent):
        async with agent.run(start("endless")) as command:
            await command.started()
            await command.close_stdin()
        await ended.wait()


async def test_unread_output_blocks_nobody() -> None:
    async with guest() as (_, agent), agent.run(start("yes")) as stuck, agent.run(start("yes", process="q")) as other:
        await stuck.started()
        read = 0
        async for event in other:
            assert isinstance(event, Stdout)
            read += len(event.data)
            if read > 5_000_000:
                break
        await agent.stats()


async def test_removing_a_container_ends_its_processes() -> None:
    async with guest() as (_, agent), agent.run(start("sleep", "infinity")) as command:
        await command.started()
        await agent.remove_container("c")
        assert await collect(command) == [Exited(137, 9)]


async def test_many_at_once() -> None:
    async with guest() as (_, agent), anyio.create_task_group() as group:

        async def one(number: int) -> None:
            async with agent.run(start("echo", str(number), process=f"p{number}")) as command:
                assert await collect(command) == [Stdout(f"{number}\n".encode()), Exited(0)]
                await command.finished()

        for number in range(300):
            group.start_soon(one, number)


async def test_after_the_end() -> None:
    fake = FakeAgent()
    async with fake.connected() as sock:
        async with connect(sock) as agent:
            await agent.setup(SetupRequest(hostname="guest"))
        with pytest.raises(AgentLostError, match="closed by the host"):
            await agent.stats()


async def test_agent_outlives_a_connection() -> None:
    async with guest() as (fake, _):
        pass
    async with fake.connected() as sock, connect(sock) as agent:
        assert set((await agent.stats()).containers) == {"c"}
