"""A Run that comes ahead of HTTP/2: with an agent that keeps to the rules, and with others."""

from __future__ import annotations

import anyio
import pytest
from hyperframe.frame import ExtensionFrame

from pykata.agent import bulk
from pykata.agent.client import AgentClient, Exited, Stdout
from pykata.agent.early import CANCEL, END, REQUESTS
from pykata.agent.guard import EARLY
from pykata.agent.parking import RUN
from pykata.agent.stream import frame as grpc_message
from pykata.agent.v1 import Ended as EndedMessage
from pykata.agent.v1 import Exited as ExitedMessage
from pykata.agent.v1 import Process, RunRequest, RunResponse, Start, Started, StatsResponse
from pykata.errors import AgentError, AgentProtocolError, AgentRefusedError
from tests.agent.peer import Peer, facing

pytestmark = pytest.mark.usefixtures("bounded_memory")

GUARD = 300.0                    # seconds; only a hang takes that long
PREFACE = 24
STARTED = RunResponse(started=Started(pid=1))
EXITED = RunResponse(exited=ExitedMessage())


def says(response: RunResponse) -> bytes:
    return bulk.frame(EARLY, bulk.MESSAGE, grpc_message(bytes(response)))


def over(code: int = 0, text: bytes = b"") -> bytes:
    return bulk.frame(EARLY, bulk.MESSAGE, bytes((END,)) + (1 + len(text)).to_bytes(4) + bytes((code,)) + text)


WELL = says(STARTED) + says(RunResponse(stdout=b"out")) + says(EXITED) + over()


def start(window: int = 64 * 1024) -> Start:
    return Start(container_id="c", process=Process(id="p", args=["true"]), window=window)


async def followed(agent: AgentClient) -> list[object]:
    """All events of a command that runs to its end."""
    async with agent.run(start()) as command:
        events: list[object] = [event async for event in command]
        await command.finished()
    return events


async def outcome(*pieces: bytes) -> list[object] | AgentError:
    """What a command is told of an agent that sends this."""

    async def script(peer: Peer) -> None:
        await peer.ahead(RUN)
        for piece in pieces:
            await peer.send(piece)
            await anyio.lowlevel.checkpoint()
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script, saved=True) as agent:
            try:
                return await followed(agent)
            except AgentError as error:
                return error


async def test_one_after_the_other_without_http2() -> None:
    asked: list[Start | None] = []

    async def script(peer: Peer) -> None:
        for _ in range(3):
            asked.append(RunRequest.parse(await peer.ahead(RUN)).start)
            await peer.send(WELL)
        await peer._reader.readexactly(PREFACE)
        await peer.answer(await peer.request(), bytes(StatsResponse()))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script, saved=True) as agent:
            for _ in range(3):
                assert await followed(agent) == [Stdout(b"out"), Exited(0)]
            assert await agent.stats() == StatsResponse()
    assert [one and one.bulk for one in asked] == [EARLY] * 3


async def test_answers_may_come_in_any_pieces() -> None:
    assert await outcome(*(WELL[at : at + 1] for at in range(len(WELL)))) == [Stdout(b"out"), Exited(0)]


async def test_much_output_comes_in_bulk_as_ever() -> None:
    begins = says(RunResponse(bulk=EndedMessage(stdout=True)))
    much = begins + bulk.frame(EARLY, 0, b"x" * 10_000) + says(EXITED) + over()
    assert await outcome(says(STARTED), much) == [Stdout(b"x" * 10_000), Exited(0)]


async def test_a_second_one_at_the_same_time_goes_by_http2() -> None:
    async def script(peer: Peer) -> None:
        await peer.ahead(RUN)
        await peer.send(says(STARTED))
        await peer._reader.readexactly(PREFACE)
        stream = await peer.request()
        await peer.answer(stream, bytes(STARTED), bytes(EXITED))
        await peer.send(says(EXITED) + over())
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script, saved=True) as agent, agent.run(start()) as first:
            await first.started()
            assert await followed(agent) == [Exited(0)]
            assert [event async for event in first] == [Exited(0)]
            await first.finished()


async def test_what_follows_comes_behind_the_preface() -> None:
    frames: list[tuple[int, bytes]] = []
    heard = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.ahead(RUN)
        await peer.send(says(STARTED))
        await peer._reader.readexactly(PREFACE)
        while not frames or frames[-1][0] != CANCEL:
            frame = await peer.read_frame()
            if isinstance(frame, ExtensionFrame):
                frames.append((frame.stream_id, bytes(frame.body)))
        heard.set()
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script, saved=True) as agent:
            async with agent.run(start()) as command:
                await command.started()
                await command.send_stdin(b"input")
                await command.close_stdin()
            await heard.wait()
    closed = grpc_message(bytes(RunRequest(stdin_closed=True)))
    assert frames == [(EARLY, b"input"), (REQUESTS, closed), (CANCEL, b"\0")]


async def test_a_flood_that_nobody_reads_ends_the_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.ahead(RUN)
        await peer.send(says(STARTED))
        while True:
            await peer.send(bulk.frame(EARLY, bulk.MESSAGE, grpc_message(bytes(200 * 1024))))

    with anyio.fail_after(GUARD):
        async with facing(script, saved=True) as agent, agent.run(start()) as command:
            await command.started()
            assert isinstance(await agent.lost(), AgentProtocolError)


async def test_a_refusal_is_that_of_any_call() -> None:
    refused = await outcome(over(5, b"container c: no such container"))
    assert isinstance(refused, AgentRefusedError)
    assert (refused.status, str(refused)) == ("NOT_FOUND", "the agent refused: container c: no such container")


@pytest.mark.parametrize(
    "said",
    [
        over(17),
        says(STARTED) + over() + says(EXITED),
        says(STARTED) + over(),
        bulk.frame(EARLY, bulk.MESSAGE, bytes((END,)) + bytes(4)),
        bulk.frame(EARLY, bulk.MESSAGE, bytes((END,)) + b"\xff" * 4),
        bulk.frame(EARLY, bulk.MESSAGE, b"\x01" + bytes(4)),
        bulk.frame(EARLY, 3, b"x"),
        bulk.frame(EARLY - 2, 0, b"x"),
        says(STARTED) + bulk.frame(EARLY, 0, b"x" * 70_000),
    ],
    ids=["status", "behind the end", "no exit", "no status", "long status", "compressed", "flag", "stream", "window"],
)
async def test_what_breaks_the_rules_ends_the_connection(said: bytes) -> None:
    assert isinstance(await outcome(said), AgentProtocolError)
