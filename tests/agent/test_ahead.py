"""The call that comes ahead of HTTP/2 on a connection to an agent that was saved, and what it may be answered with."""

from __future__ import annotations

import time
from contextlib import suppress

import anyio
import pytest
from hyperframe.frame import WindowUpdateFrame

from pykata.agent import bulk
from pykata.agent.parking import CLONE
from pykata.agent.stream import frame as grpc_message
from pykata.agent.v1 import CloneRequest, CloneResponse, StatsResponse
from pykata.errors import AgentError, AgentLostError, AgentProtocolError, AgentRefusedError
from tests.agent.peer import Peer, facing

pytestmark = pytest.mark.usefixtures("bounded_memory")

GUARD = 60.0                    # seconds; only a hang takes that long
FRAME = 9                       # bytes of a frame's header
PREFACE = 24


def answer(message: bytes, flag: int = 0, stream: int = 0) -> bytes:
    return bulk.frame(stream, flag, grpc_message(message))


def now(*, late: float = 0.0) -> bytes:
    return bytes(CloneResponse(generation=7, unix_time_ns=time.time_ns() - int(late * 1e9)))


async def answered(*pieces: bytes, ends: bool = False) -> CloneResponse | AgentError:
    """What an agent is taken to have said that sends this."""

    async def script(peer: Peer) -> None:
        await peer.ahead(CLONE)
        for piece in pieces:
            await peer.send(piece)
            await anyio.lowlevel.checkpoint()
        if not ends:
            await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script, saved=True) as agent:
            try:
                return await agent.clone(CloneRequest(hostname="clone"))
            except AgentError as error:
                return error


async def test_the_request_comes_before_all_else_and_calls_go_on() -> None:
    asked: list[CloneRequest] = []

    async def script(peer: Peer) -> None:
        asked.append(CloneRequest.parse(await peer.ahead(CLONE)))
        await peer.send(answer(now()))
        await peer._reader.readexactly(PREFACE)
        await peer.answer(await peer.request(), bytes(StatsResponse()))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script, saved=True) as agent:
            assert (await agent.clone(CloneRequest(hostname="clone"))).generation == 7
            assert await agent.stats() == StatsResponse()
    assert asked[0].hostname == "clone"
    assert asked[0].unix_time_ns > 0


async def test_an_answer_may_come_in_pieces_and_behind_other_frames() -> None:
    said = WindowUpdateFrame(0, 1).serialize() + answer(now())
    got = await answered(*(said[at : at + 1] for at in range(len(said))))
    assert isinstance(got, CloneResponse)
    assert got.generation == 7


async def test_a_clock_that_is_late_is_set_again() -> None:
    asked: list[CloneRequest] = []

    async def script(peer: Peer) -> None:
        for late in (1.0, 0.0):
            asked.append(CloneRequest.parse(await peer.ahead(CLONE)))
            await peer.send(answer(now(late=late)))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script, saved=True) as agent:
            await agent.clone(CloneRequest(hostname="clone"))
    assert [one.hostname for one in asked] == ["clone", ""]


async def test_a_refusal_says_why() -> None:
    refused = await answered(answer(b"Setup has not been called\x1b", flag=1))
    assert isinstance(refused, AgentRefusedError)
    assert str(refused) == r"the agent refused: Setup has not been called\x1b"


@pytest.mark.parametrize(
    "said",
    [answer(b"\xff" * 20), answer(bytes(200 * 1024)), answer(now(), stream=1), answer(now(), flag=2)],
    ids=["no message", "too long", "of another call", "unknown flag"],
)
async def test_what_is_no_answer_ends_the_connection(said: bytes) -> None:
    assert isinstance(await answered(said), AgentProtocolError)


async def test_a_second_answer_ends_the_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.ahead(CLONE)
        await peer.send(answer(now()) * 2)
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script, saved=True) as agent:
            with suppress(AgentError):
                await agent.clone(CloneRequest())
            assert isinstance(await agent.lost(), AgentProtocolError)


async def test_a_connection_that_ends_before_the_answer() -> None:
    assert isinstance(await answered(answer(now())[:FRAME], ends=True), AgentLostError)


async def test_nobody_may_answer_what_was_not_asked() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.send(answer(now()))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            assert isinstance(await agent.lost(), AgentProtocolError)
