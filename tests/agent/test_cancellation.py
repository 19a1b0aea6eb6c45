"""Cancelled at any await, a call leaves nothing behind, and the connection goes on as if it had never been."""

from __future__ import annotations

import anyio
import anyio.lowlevel

from pykata.agent.client import AgentClient, Exited, RunStream, Stderr, Stdout, connect
from pykata.agent.v1 import CreateContainerRequest, Mount, Process, Rootfs, SetupRequest, Start
from pykata.testing import FakeAgent
from tests.cancellation import Way, cancel_everywhere

ROOTFS = Rootfs(lowers=[Mount(disk_serial="d1", type="squashfs")])


async def idle(fake: FakeAgent) -> None:
    """Wait until the agent has noticed that its calls were left."""
    with anyio.fail_after(300):
        while fake.containers["c"].processes:
            await anyio.lowlevel.checkpoint()


async def exchange(agent: AgentClient) -> None:
    await agent.stats()
    start = Start(container_id="c", process=Process(id="p", args=["cat"]))
    async with agent.run(start) as command:
        await command.started()
        await command.send_stdin(b"hello")
        assert await anext(command) == Stdout(b"hello")
        await agent.signal("c", "p", 0)
        await command.close_stdin()
        assert await anext(command) == Exited(0)
        await command.finished()


async def test_calls() -> None:
    fake = FakeAgent()
    async with fake.connected() as sock, connect(sock) as agent:
        await agent.setup(SetupRequest(hostname="guest"))
        await agent.create_container(CreateContainerRequest(id="c", rootfs=ROOTFS))

        async def afterwards(n: int, way: Way) -> None:
            await idle(fake)
            await exchange(agent)

        assert await cancel_everywhere(lambda: exchange(agent), afterwards) >= 5
        assert agent._channel._streams == {}


async def test_connecting() -> None:
    fake = FakeAgent()

    async def visit() -> None:
        async with fake.connected() as sock, connect(sock) as agent:
            await agent.stats()

    fake.setup = SetupRequest(hostname="guest")

    async def afterwards(n: int, way: Way) -> None:
        pass        # tasks and descriptors that are left fail any test

    assert await cancel_everywhere(visit, afterwards) > 3


async def test_no_output_is_lost() -> None:
    """A reader that is cancelled at every one of its awaits, and goes on, has read everything in the end."""
    fake = FakeAgent()
    got = bytearray()

    async with fake.connected() as sock, connect(sock) as agent:
        await agent.setup(SetupRequest(hostname="guest"))
        await agent.create_container(CreateContainerRequest(id="c", rootfs=ROOTFS))
        start = Start(container_id="c", process=Process(id="p", args=["cat"]))
        async with agent.run(start) as command, anyio.create_task_group() as group:
            group.start_soon(feed, command)
            await read_with_interruptions(command, got)
    assert got == bytes(range(256)) * 4000


async def feed(command: RunStream) -> None:
    for _ in range(40):
        await command.send_stdin(bytes(range(256)) * 100)
    await command.close_stdin()


async def read_with_interruptions(command: RunStream, got: bytearray) -> None:
    while True:
        with anyio.CancelScope() as scope:
            async for event in command:
                if isinstance(event, Exited):
                    return
                assert isinstance(event, Stdout | Stderr)
                got += event.data
                scope.cancel()      # delivered at the next await
        await anyio.lowlevel.checkpoint()
