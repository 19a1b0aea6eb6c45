"""An agent that doesn't keep to the windows of stdin, stdout and stderr, or lies in what came with them."""

from __future__ import annotations

import anyio
import pytest
from hyperframe.frame import DataFrame, SettingsFrame, WindowUpdateFrame

from pykata.agent.bulk import STDIN_WINDOW
from pykata.agent.client import AgentClient, Room, RunStream, Stderr, Stdout
from pykata.agent.run import MAX_WINDOW, PIECE
from pykata.agent.stream import PREFIX
from pykata.agent.stream import frame as grpc_message
from pykata.agent.v1 import (
    Ended,
    InspectResponse,
    Process,
    ResizeResponse,
    RunRequest,
    RunResponse,
    Start,
    Started,
    Terminal,
)
from pykata.errors import AgentError, AgentLostError, AgentProtocolError, AgentTimeoutError
from tests.agent.conftest import MUCH
from tests.agent.peer import OK_TRAILERS, Peer, Script, data, facing

pytestmark = pytest.mark.usefixtures("bounded_memory")

GUARD = 300.0                    # seconds; only a hang takes that long
WINDOW = 64 * 1024
START = Start(container_id="c", process=Process(id="p", args=["true"]), window=WINDOW)
STARTED = bytes(RunResponse(started=Started(pid=1)))
OUT, ERR = bytes(RunResponse(stdout=bytes(16_000))), bytes(RunResponse(stderr=bytes(16_000)))


def sends(*messages: bytes, count: int = 1, end: bool = False) -> Script:
    """An agent that answers its first call with these messages, so many times, and then listens."""

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        async with anyio.create_task_group() as group:
            await peer.answer(stream, STARTED, trailers=None)
            group.start_soon(peer.drain)
            for _ in range(count):
                for message in messages:
                    framed = grpc_message(message)
                    await peer.send(*(data(stream, framed[at : at + 16_384]) for at in range(0, len(framed), 16_384)))
            if end:
                await peer.send(peer.headers(stream, OK_TRAILERS, end=True))

    return script


async def to_the_end(command: RunStream) -> int:
    """Take in everything, and say to have taken only what came on stdout."""
    size = 0
    async for event in command:
        match event:
            case Stdout(piece):
                size += len(piece)
                command.took("stdout", len(piece))
            case Stderr(piece):
                size += len(piece)
    return size


@pytest.mark.parametrize(("message", "name"), [(OUT, "stdout"), (ERR, "stderr")])
async def test_more_than_was_allowed(message: bytes, name: str) -> None:
    with anyio.fail_after(GUARD):
        async with facing(sends(message, count=5)) as agent, agent.run(START) as command:
            for _ in range(WINDOW // 16_000):
                assert isinstance(await anext(command), Stdout | Stderr)
            with pytest.raises(AgentProtocolError, match=f"of {name} that it wasn't allowed"):
                await anext(command)
            with pytest.raises(AgentProtocolError):
                await agent.stats()


async def test_one_stream_is_no_excuse_for_the_other() -> None:
    with anyio.fail_after(GUARD):
        async with facing(sends(OUT, ERR, count=5)) as agent, agent.run(START) as command:
            with pytest.raises(AgentProtocolError, match="of stderr that it wasn't allowed"):
                await to_the_end(command)


@pytest.mark.parametrize("size", [MAX_WINDOW, 2**32 - 1])
async def test_room_for_more_input_than_there_can_be(size: int) -> None:
    with anyio.fail_after(GUARD):
        async with facing(sends(bytes(RunResponse(stdin_window=size)))) as agent, agent.run(START) as command:
            with pytest.raises(AgentProtocolError, match="window of stdin"):
                await to_the_end(command)


async def test_room_in_tiny_pieces_is_a_flood_that_ends() -> None:
    # Each is a message with next to nothing in it: what they add up to is bounded, and so is what is kept of them.
    with anyio.fail_after(GUARD):
        async with facing(sends(bytes(RunResponse(stdin_window=1)), count=3000)) as agent, agent.run(START) as command:
            for _ in range(3000):
                assert await anext(command) == Room(1)
            assert command.stdin_room == STDIN_WINDOW + 3000


@pytest.mark.parametrize("what", ["both", "stdout", "stderr"])
async def test_output_after_its_end(what: str) -> None:
    ended = bytes(RunResponse(ended=Ended(stdout=what != "stderr", stderr=what != "stdout")))
    with anyio.fail_after(GUARD):
        async with facing(sends(ended, ERR if what == "stderr" else OUT)) as agent, agent.run(START) as command:
            with pytest.raises(AgentProtocolError, match="after its end"):
                await to_the_end(command)


async def test_input_waits_for_an_agent_that_gives_no_room() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.send(SettingsFrame(0, settings={4: MUCH}), WindowUpdateFrame(0, window_increment=MUCH))
        await peer.answer(await peer.request(), STARTED, trailers=None)
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(START) as command:
            await command.started()
            sent = 0
            while size := await command.send_some(memoryview(bytes(PIECE))):
                sent += size
            assert sent == STDIN_WINDOW, "the room that there is at first"


async def test_an_agent_that_never_reads_what_it_is_allowed() -> None:
    """It gets all its output rid of, and what is to be said of that doesn't pile up on the host."""

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, STARTED, trailers=None)
        for _ in range(WINDOW // 16_000):
            await peer.send(data(stream, grpc_message(OUT)))
        await anyio.sleep_forever()

    async with facing(script) as agent, agent.run(START) as command:
        with anyio.move_on_after(0.5) as scope:
            await to_the_end(command)
        assert scope.cancelled_caught
        with pytest.raises(AgentTimeoutError):
            await agent.resize("c", "p", 1, 1, timeout=0.05)


async def test_hangs_up_in_the_middle() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, STARTED, OUT, trailers=None)
        await peer.send(data(stream, grpc_message(ERR)[:100]))

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(START) as command:
            assert isinstance(await anext(command), Stdout)
            with pytest.raises(AgentLostError):
                await anext(command)


async def test_the_host_asks_for_more_when_half_of_it_is_taken() -> None:
    asked: list[tuple[int, int]] = []
    heard = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, STARTED, OUT, OUT, OUT, ERR, trailers=None)
        said = bytearray()
        while not asked:
            frame = await peer.read_frame()
            if isinstance(frame, DataFrame):
                said += frame.data
                while len(said) >= PREFIX and len(said) >= (end := PREFIX + int.from_bytes(said[1:PREFIX])):
                    request = RunRequest.parse(bytes(said[PREFIX:end]))
                    del said[:end]
                    if request.window is not None:
                        asked.append((request.window.stdout, request.window.stderr))
        heard.set()
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(START) as command:
            for _ in range(3):
                await anext(command)
            command.took("stderr", 5)
            command.took("stdout", 16_000)
            assert asked == []
            command.took("stdout", 2 * 16_000)
            await heard.wait()
    assert asked == [(3 * 16_000, 5)]


def wrong(answer: bytes) -> Script:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.answer(await peer.request(), answer)
        await peer.drain()

    return script


@pytest.mark.parametrize(
    "answer",
    [b"\x0a\x05\x08", bytes(InspectResponse(log=bytes(200_000)))],
    ids=["cut off", "longer than it may be"],
)
async def test_what_it_says_of_a_detached_process_is_checked(answer: bytes) -> None:
    with anyio.fail_after(GUARD):
        async with facing(wrong(answer)) as agent:
            with pytest.raises(AgentProtocolError):
                await agent.inspect("c", "p", wait=True)


async def test_resize_answered_twice() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        answer = bytes(ResizeResponse())
        await peer.answer(await peer.request(), answer, answer)
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            with pytest.raises(AgentProtocolError, match="more than once"):
                await agent.resize("c", "p", 1, 1)


async def test_everything_at_once() -> None:
    """Windows, ends and room in a tangle: it ends in an error of the agent's."""
    messages = [OUT, ERR, bytes(RunResponse(stdin_window=7)), bytes(RunResponse(ended=Ended(stderr=True)))]
    terminal = Start(
        container_id="c", process=Process(id="p", args=["sh"], terminal=Terminal(rows=1, cols=1)), window=WINDOW
    )

    async def call(agent: AgentClient, start: Start) -> None:
        async with agent.run(start, timeout=GUARD) as command:
            with pytest.raises(AgentError):
                await to_the_end(command)

    with anyio.fail_after(GUARD):
        async with facing(sends(*messages, count=100)) as agent, anyio.create_task_group() as group:
            group.start_soon(call, agent, START)
            group.start_soon(call, agent, terminal)


def test_a_window_request_is_small() -> None:
    from pykata.agent.run import WINDOW_SIZE
    from pykata.agent.v1 import Window

    largest = RunRequest(window=Window(stdout=2**32 - 1, stderr=2**32 - 1))
    assert len(grpc_message(bytes(largest))) <= WINDOW_SIZE
