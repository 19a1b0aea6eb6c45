"""Commands that are asked for and answered in a frame each: an agent that keeps to the rules, and those that don't."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest
from hyperframe.frame import ExtensionFrame, Frame, HeadersFrame

from pykata.agent import bulk
from pykata.agent.bulk import Stdout
from pykata.agent.client import AgentClient, Exited
from pykata.agent.stream import frame as grpc_message
from pykata.agent.v1 import Ended, Process, RunRequest, RunResponse, SetupRequest, SetupResponse, Start, Started
from pykata.agent.v1 import Exited as ExitedMessage
from pykata.errors import AgentError, AgentLostError, AgentProtocolError, AgentRefusedError
from tests.agent.peer import OK_TRAILERS, Peer, data, facing

pytestmark = pytest.mark.usefixtures("bounded_memory")

GUARD = 300.0                    # seconds; only a hang takes that long
STARTED = RunResponse(started=Started(pid=7))
HELLO = RunResponse(stdout=b"hello")
EXITED = RunResponse(exited=ExitedMessage(exit_code=3))

Script = Callable[[Peer, int], Awaitable[None]]


def messages(*responses: RunResponse) -> bytes:
    return b"".join(grpc_message(bytes(response)) for response in responses)


def answer(number: int, flag: int, payload: bytes) -> bytes:
    return bulk.frame(number, flag, payload)


def start() -> Start:
    process = Process(id="p", args=["true"])
    return Start(container_id="c", process=process, window=65536, stdin_closed=True, collected=True)


async def asked(peer: Peer) -> ExtensionFrame:
    """The next frame beside HTTP/2 that the host sends."""
    while True:
        frame = await peer.read_frame()
        if isinstance(frame, ExtensionFrame):
            return frame


async def ready(peer: Peer) -> None:
    """An agent that takes short commands, as far as Setup."""
    await peer.greet()
    await peer.answer(await peer.request(), bytes(SetupResponse(short_commands=True)))


async def run(agent: AgentClient) -> tuple[int, list[object]]:
    async with agent.run(start()) as command:
        pid = await command.started()
        events: list[object] = [event async for event in command]
        await command.finished()
    return pid, events


async def told(script: Script) -> tuple[int, list[object]]:
    """What a command is told of an agent that reads its frame and then plays this script."""

    async def play(peer: Peer) -> None:
        await ready(peer)
        frame = await asked(peer)
        assert (frame.flag_byte, frame.stream_id % 2) == (bulk.COMMAND, 0)
        assert RunRequest.parse(bytes(frame.body)).start is not None
        await script(peer, frame.stream_id)
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(play) as agent:
            await agent.setup(SetupRequest(hostname="guest"))
            try:
                return await run(agent)
            except AgentError as error:
                failed = error
    raise failed


async def test_all_comes_in_one_frame() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.send(answer(number, bulk.OVER, messages(STARTED, HELLO, EXITED)))

    assert await told(script) == (7, [Stdout(b"hello"), Exited(3)])


async def test_a_frame_in_pieces() -> None:
    async def script(peer: Peer, number: int) -> None:
        for byte in answer(number, bulk.OVER, messages(STARTED, HELLO, EXITED)):
            await peer.send(bytes((byte,)))
            await anyio.lowlevel.checkpoint()

    assert await told(script) == (7, [Stdout(b"hello"), Exited(3)])


async def test_what_goes_on_is_a_call() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.send(answer(number, bulk.GOES_ON, messages(STARTED, HELLO)))
        stream = await peer.request()
        first = await peer.read_frame()
        assert RunRequest.parse(bytes(first.data)[5:]).attach == number  # type: ignore[attr-defined]
        await peer.answer(stream, bytes(HELLO), bytes(RunResponse(bulk=Ended(stdout=True))), trailers=None)
        await peer.send(answer(number, 0, b"much"), data(stream, messages(EXITED)))
        await peer.send(peer.headers(stream, OK_TRAILERS, end=True))

    hello = Stdout(b"hello")
    assert await told(script) == (7, [hello, hello, Stdout(b"much"), Exited(3)])


async def test_a_refusal() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.send(answer(number, bulk.FAILED, b"\x05no such thing: \xff %"))

    with pytest.raises(AgentRefusedError, match="no such thing") as refused:
        await told(script)
    assert refused.value.status == "NOT_FOUND"


@pytest.mark.parametrize(
    "payload", [messages(STARTED), messages(EXITED), b"\x00", b"\xff" * 40, messages(STARTED, STARTED, EXITED)]
)
async def test_what_no_agent_would_answer(payload: bytes) -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.send(answer(number, bulk.OVER, payload))

    with pytest.raises(AgentProtocolError):
        await told(script)


@pytest.mark.parametrize(
    "hostile",
    [
        lambda number: answer(number + 2, bulk.OVER, messages(STARTED, EXITED)),
        lambda number: answer(number + 1, bulk.OVER, messages(STARTED, EXITED)),
        lambda number: answer(number, bulk.OVER, b""),
        lambda number: answer(number, 6, b"x"),
        lambda number: answer(number, 0, b"x"),
        lambda number: (bulk.LONGEST_ANSWER + 1).to_bytes(3) + bytes((bulk.KIND, 3)) + number.to_bytes(4),
        lambda number: data(number, b"x").serialize(),
        lambda number: answer(number, bulk.GOES_ON, messages(STARTED)) + answer(number, bulk.OVER, messages(EXITED)),
    ],
    ids=["another", "odd", "empty", "flags", "output", "long", "http2", "twice"],
)
async def test_frames_that_break_the_protocol(hostile: Callable[[int], bytes]) -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.send(hostile(number))

    with pytest.raises(AgentProtocolError):
        await told(script)


async def test_an_end_is_an_error() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.send(answer(number, bulk.OVER, messages(STARTED, EXITED))[:-3])
        peer.close()

    with pytest.raises(AgentLostError):
        await told(script)


@pytest.mark.parametrize("flag", [bulk.OVER, bulk.GOES_ON])
async def test_who_leaves_says_so_and_a_late_answer_is_nobodys(flag: int) -> None:
    begun = anyio.CancelScope()

    async def play(peer: Peer) -> None:
        await ready(peer)
        number = (await asked(peer)).stream_id
        begun.cancel()
        frame = await asked(peer)
        assert (frame.stream_id, frame.flag_byte) == (number, bulk.LEAVE)
        await peer.send(answer(number, flag, messages(STARTED, EXITED)))
        number = (await asked(peer)).stream_id
        await peer.send(answer(number, bulk.OVER, messages(STARTED, EXITED)))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(play) as agent:
            await agent.setup(SetupRequest(hostname="guest"))
            with begun:
                await run(agent)
            assert await run(agent) == (7, [Exited(3)])


async def test_who_is_not_known_to_take_them_gets_a_call() -> None:
    seen: list[Frame] = []

    async def play(peer: Peer) -> None:
        await peer.greet()
        while not isinstance(frame := await peer.read_frame(), HeadersFrame):
            seen.append(frame)
        await peer.answer(frame.stream_id, bytes(STARTED), bytes(EXITED))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(play) as agent:
            assert await run(agent) == (7, [Exited(3)])
    assert not any(isinstance(frame, ExtensionFrame) for frame in seen)
