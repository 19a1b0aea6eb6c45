"""An agent that floods, starves or stalls the host: it costs bounded memory, and ends in a typed error in time."""

from __future__ import annotations

import anyio
import pytest
from hyperframe.frame import Frame, HeadersFrame, PingFrame, SettingsFrame, WindowUpdateFrame

from pykata.agent.client import AgentClient, RunStream
from pykata.agent.stream import frame as grpc_message
from pykata.agent.v1 import Process, RunResponse, SetupRequest, Start, Started, StatsResponse
from pykata.errors import AgentError, AgentLostError, AgentProtocolError, AgentTimeoutError
from tests.agent.peer import OK_HEADERS, Peer, data, facing, reset

pytestmark = pytest.mark.usefixtures("bounded_memory")

GUARD = 300.0    # seconds; only a hang takes that long
START = Start(container_id="c", process=Process(id="p", args=["true"]))


FLOODS: dict[str, Frame] = {
    "PING": PingFrame(0, b"12345678"),
    "PING ACK": PingFrame(0, b"12345678", flags=["ACK"]),
    "SETTINGS": SettingsFrame(0, settings={1: 4096}),
    "SETTINGS that change windows": SettingsFrame(0, settings={4: 65535, 3: 100}),
    "SETTINGS ACK": SettingsFrame(0, flags=["ACK"]),
    "RST_STREAM of other streams": reset(1),
    "WINDOW_UPDATE": WindowUpdateFrame(0, window_increment=1),
    "WINDOW_UPDATE of a stream": WindowUpdateFrame(3, window_increment=1),
    "empty DATA": data(3, b""),
}


@pytest.mark.parametrize("what", FLOODS)
@pytest.mark.parametrize("reads", [True, False])
async def test_flood(what: str, reads: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        first = await peer.request()
        await peer.answer(first, bytes(StatsResponse()))
        stream = await peer.request()
        await peer.send(HeadersFrame(stream, peer.headers(stream).data, flags=["END_HEADERS"]))
        burst = FLOODS[what].serialize() * 1000
        async with anyio.create_task_group() as group:
            if reads:
                group.start_soon(peer.drain)
            while True:
                await peer.send(burst)

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            await agent.stats()
            with pytest.raises(AgentProtocolError):
                await agent.stats(timeout=GUARD)


async def test_data_after_a_reset() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.send(peer.headers(stream), data(stream, grpc_message(bytes(RunResponse(started=Started(pid=1))))))
        async with anyio.create_task_group() as group:
            group.start_soon(peer.drain)
            while True:
                await peer.send(data(stream, bytes(10_000)))

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            async with agent.run(START) as command:
                await command.started()
            with pytest.raises(AgentProtocolError, match="isn't open"):
                await agent.stats(timeout=GUARD)


@pytest.mark.parametrize("size", [64, 16384])
async def test_ignores_the_window(size: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.send(peer.headers(stream), data(stream, grpc_message(bytes(RunResponse(started=Started(pid=1))))))
        while True:
            await peer.send(data(stream, bytes(size)))

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(START) as command:
            await command.started()
            with pytest.raises(AgentProtocolError):
                await agent.stats(timeout=GUARD)


async def test_announces_4_gib() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.send(peer.headers(stream), data(stream, b"\0\xff\xff\xff\xff"))
        while True:
            await peer.send(data(stream, bytes(16384)))

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            with pytest.raises(AgentProtocolError, match="4294967295"):
                await agent.stats(timeout=GUARD)


async def test_never_answers() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.drain()

    async with facing(script) as agent:
        with pytest.raises(AgentTimeoutError, match=r"Stats within 1 s"):
            await agent.stats(timeout=1)
        async with agent.run(START, timeout=1) as command:
            with pytest.raises(AgentTimeoutError, match="start the process"):
                await command.started()
            with pytest.raises(AgentTimeoutError, match="finish"):
                await command.finished(timeout=0.05)


async def test_never_greets() -> None:
    async with facing(Peer.drain) as agent:
        with pytest.raises(AgentTimeoutError, match=r"Setup within 0\.05 s"):
            await agent.setup(SetupRequest(), timeout=0.05)


async def test_allows_no_streams() -> None:
    async def script(peer: Peer) -> None:
        await peer.send(SettingsFrame(0, settings={3: 0}))
        await peer.drain()

    async with facing(script) as agent:
        with pytest.raises(AgentTimeoutError):
            await agent.setup(SetupRequest(), timeout=0.05)
        with pytest.raises(AgentTimeoutError, match="take the command"):
            async with agent.run(START, timeout=0.05):
                pytest.fail("there was no stream to be had")


async def test_gives_no_window() -> None:
    async def script(peer: Peer) -> None:
        await peer.send(SettingsFrame(0, settings={4: 0}))
        await peer.drain()

    async with facing(script) as agent:
        with pytest.raises(AgentTimeoutError):
            await agent.setup(SetupRequest(), timeout=0.05)


async def test_never_reads() -> None:
    """What the host wants to send waits with whoever sends it, not in memory."""

    async def script(peer: Peer) -> None:
        await peer.send(
            SettingsFrame(0, settings={4: 2**31 - 1}), WindowUpdateFrame(0, window_increment=2**31 - 1 - 65535)
        )
        await anyio.sleep_forever()

    big = Start(container_id="c", process=Process(id="p", args=["x" * 1_000_000]))
    timeouts = 0

    async def run(agent: AgentClient) -> None:
        nonlocal timeouts
        with pytest.raises(AgentTimeoutError):
            async with agent.run(big, timeout=0.5) as command:
                await command.started()
        timeouts += 1

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(run, agent)
    assert timeouts == 4


async def test_stdin_of_a_process_that_never_reads() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(RunResponse(started=Started(pid=1))), trailers=None)
        await peer.drain()

    sent = 0

    async def feed(command: RunStream) -> None:
        nonlocal sent
        while True:
            await command.send_stdin(bytes(10_000))
            sent += 10_000

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(START) as command:
            await command.started()
            async with anyio.create_task_group() as group:
                group.start_soon(feed, command)
                while sent < 50_000:
                    await anyio.lowlevel.checkpoint()
                await anyio.sleep(0.1)      # in which more could be sent
                group.cancel_scope.cancel()
    assert 50_000 <= sent <= 65_535     # the window that every stream has at first


async def test_an_unread_stream_blocks_nobody() -> None:
    """More than 2^31 bytes aren't needed to show it: one stream's window is full, and another call is answered."""

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        piece = grpc_message(bytes(RunResponse(stdout=bytes(16000))))
        await peer.answer(stream, bytes(RunResponse(started=Started(pid=1))), trailers=None)
        for _ in range(256 * 1024 // len(piece) - 1):
            await peer.send(data(stream, piece))
        await peer.answer(await peer.request(), bytes(StatsResponse(agent_rss=7)))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(START) as command:
            await command.started()
            assert (await agent.stats()).agent_rss == 7


@pytest.mark.parametrize("after", [0, 3, 5, 7])
async def test_hangs_up_inside_a_message(after: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        answer = grpc_message(bytes(StatsResponse(agent_rss=1000)))
        await peer.send(peer.headers(stream), data(stream, answer[:after]))

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            with pytest.raises(AgentLostError):
                await agent.stats()


async def test_all_of_it_at_once() -> None:
    """Junk of every kind while a command runs and calls are under way: each ends in an error of the agent's."""

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(RunResponse(started=Started(pid=1))), headers=OK_HEADERS, trailers=None)
        await peer.send(*(frame for frame in FLOODS.values() if frame.stream_id == 0), b"\xff" * 500)
        await peer.drain()

    async def call(agent: AgentClient) -> None:
        with pytest.raises(AgentError):
            await agent.stats(timeout=GUARD)

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(START) as command, anyio.create_task_group() as group:
            group.start_soon(call, agent)
            group.start_soon(call, agent)
            with pytest.raises(AgentError):
                async for _ in command:
                    pass
