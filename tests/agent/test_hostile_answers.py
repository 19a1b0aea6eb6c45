"""An agent that speaks HTTP/2 well and gRPC or its own protocol badly."""

from __future__ import annotations

import anyio
import pytest

from pykata.agent.client import AgentClient, Exited, OutputEvent, RunStream, Stderr, Stdout
from pykata.agent.stream import frame as grpc_message
from pykata.agent.v1 import Ended as EndedMessage
from pykata.agent.v1 import Exited as ExitedMessage
from pykata.agent.v1 import Process, RunResponse, SetupRequest, SetupResponse, Start, Started, StatsResponse
from pykata.errors import AgentError, AgentLostError, AgentProtocolError, AgentRefusedError
from tests.agent.peer import OK_HEADERS, OK_TRAILERS, Peer, Script, data, facing, reset

GUARD = 300.0    # seconds; only a hang takes that long
START = Start(container_id="c", process=Process(id="p", args=["true"]))
STATS = bytes(StatsResponse(agent_rss=1))
STARTED = bytes(RunResponse(started=Started(pid=1)))
ENDED = bytes(RunResponse(ended=EndedMessage(stdout=True)))
EXITED = bytes(RunResponse(exited=ExitedMessage(exit_code=0)))
Pairs = tuple[tuple[bytes, bytes], ...]


def status(code: bytes, message: bytes | None = None) -> Pairs:
    return ((b"grpc-status", code), *(((b"grpc-message", message),) if message is not None else ()))


async def stats_error(script: Script, error: type[AgentError]) -> AgentError:
    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            with pytest.raises(error) as raised:
                await agent.stats(timeout=GUARD)
    assert str(raised.value).isprintable()
    return raised.value


BODIES: dict[str, bytes] = {
    "compressed": b"\1" + grpc_message(STATS)[1:],
    "flag 255": b"\xff" + grpc_message(STATS)[1:],
    "two answers": grpc_message(STATS) * 2,
    "no answer": b"",
    "half a prefix": b"\0\0",
    "half a message": grpc_message(STATS)[:-1],
    "longer than it may be": grpc_message(bytes(200_000)),
    "truncated varint": grpc_message(b"\x08\xff"),
    "endless varint": grpc_message(b"\x08" + b"\xff" * 20),
    "invalid UTF-8 in a map's key": grpc_message(b"\x2a\x04\x0a\x02\xff\xfe"),
}


@pytest.mark.parametrize("what", BODIES)
async def test_body(what: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.send(peer.headers(stream))
        for at in range(0, len(BODIES[what]), 10_000):
            await peer.send(data(stream, BODIES[what][at : at + 10_000]))
        await peer.send(peer.headers(stream, OK_TRAILERS, end=True))
        await peer.drain()

    await stats_error(script, AgentProtocolError)


HEADERS: dict[str, tuple[Pairs, Pairs]] = {
    "HTTP 500": (((b":status", b"500"), OK_HEADERS[1]), OK_TRAILERS),
    "HTTP status that isn't a number": (((b":status", b"\xff\x1b"), OK_HEADERS[1]), OK_TRAILERS),
    "no content type": (((b":status", b"200"),), OK_TRAILERS),
    "HTML": (((b":status", b"200"), (b"content-type", b"text/html")), OK_TRAILERS),
    "no status": (OK_HEADERS, ((b"a", b"b"),)),
    "empty status": (OK_HEADERS, status(b"")),
    "status in words": (OK_HEADERS, status(b"fine")),
    "negative status": (OK_HEADERS, status(b"-1")),
    "status 17": (OK_HEADERS, status(b"17")),
    "status of 1000 digits": (OK_HEADERS, status(b"1" * 1000)),
    "status in other digits": (OK_HEADERS, status("²".encode())),
    "trailers with a pseudo header": (OK_HEADERS, ((b":status", b"200"), (b"grpc-status", b"0"))),
    "content length": ((*OK_HEADERS, (b"content-length", b"3")), OK_TRAILERS),
}


@pytest.mark.parametrize("what", HEADERS)
async def test_headers(what: str) -> None:
    headers, trailers = HEADERS[what]

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.answer(await peer.request(), STATS, headers=headers, trailers=trailers)
        await peer.drain()

    await stats_error(script, AgentProtocolError)


async def test_refusal() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        said = b"step: open: %1b%5b31m/etc/%ff%0a: ENOENT %zz%4"
        await peer.answer(await peer.request(), trailers=status(b"5", said))
        await peer.send(peer.headers(await peer.request(), (*OK_HEADERS, *status(b"13")), end=True))
        await peer.answer(await peer.request(), STATS, trailers=status(b"8", b"m" * 20_000))
        await peer.answer(await peer.request(), STATS)
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            with pytest.raises(AgentRefusedError) as raised:
                await agent.stats()
            assert raised.value.status == "NOT_FOUND"
            assert str(raised.value).isprintable()
            assert "/etc/" in str(raised.value)
            with pytest.raises(AgentRefusedError, match="INTERNAL") as raised:      # "trailers only"
                await agent.stats()
            assert raised.value.status == "INTERNAL"
            with pytest.raises(AgentRefusedError) as raised:
                await agent.stats()
            assert raised.value.status == "RESOURCE_EXHAUSTED"
            assert len(str(raised.value)) < 1200
            assert (await agent.stats()).agent_rss == 1     # a refusal ends the call, not the connection


@pytest.mark.parametrize(("code", "name"), [(0, "INTERNAL"), (8, "CANCELLED"), (7, "UNAVAILABLE"), (999, "INTERNAL")])
async def test_reset_call(code: int, name: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.send(reset(await peer.request(), code))
        await peer.answer(await peer.request(), STATS)
        await peer.send(reset(3))       # RFC 9113, section 8.1: the whole answer was sent before the request's end
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            with pytest.raises(AgentRefusedError) as raised:
                await agent.stats()
            assert raised.value.status == name
            assert (await agent.stats()).agent_rss == 1


async def test_strings_of_the_setup() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        answer = SetupResponse(agent_version="\x1b[31m1.0", kernel_release="6" * 5000)
        await peer.answer(await peer.request(), bytes(answer))
        await peer.answer(await peer.request(), b"\x0a\x02\xff\xfe")
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            answer = await agent.setup(SetupRequest(hostname="h"))
            assert answer.agent_version == r"\x1b[31m1.0"
            assert len(answer.kernel_release) < 100
            with pytest.raises(AgentProtocolError):
                await agent.setup(SetupRequest(hostname="h"))


def exited(code: int, signal: int = 0) -> bytes:
    return bytes(RunResponse(exited=ExitedMessage(exit_code=code, signal=signal)))


RUNS: dict[str, list[bytes]] = {
    "exits before it started": [EXITED],
    "writes before it started": [bytes(RunResponse(stdout=b"x"))],
    "starts twice": [STARTED, STARTED],
    "negative process id": [bytes(RunResponse(started=Started(pid=-1)))],
    "never exits": [STARTED],
    "nothing at all": [],
    "exit code -1": [STARTED, exited(-1)],
    "exit code 256": [STARTED, exited(256)],
    "exit code 2^31 - 1": [STARTED, exited(2**31 - 1)],
    "signal 65": [STARTED, exited(193, 65)],
    "negative signal": [STARTED, exited(0, -9)],
    "signal without its exit code": [STARTED, exited(0, 9)],
    "empty stdout": [STARTED, b"\x12\x00"],
    "empty stderr": [STARTED, b"\x1a\x00"],
    "64 KiB and a byte": [STARTED, bytes(RunResponse(stdout=bytes(65537)))],
    "more than a message may have": [STARTED, bytes(RunResponse(stdout=bytes(70_000)))],
    "empty answer": [STARTED, b""],
    "unknown answer": [STARTED, b"\x7a\x00"],
    "truncated length": [STARTED, b"\x12\xff"],
    "truncated exit": [STARTED, b"\x22\x05\x08"],
    "ends stdout, and goes on with it": [STARTED, ENDED, bytes(RunResponse(stdout=b"x"))],
    "room for stdin that nobody asked for": [STARTED, bytes(RunResponse(stdin_window=1))],
    "truncated end of a stream": [STARTED, b"\x2a\x02\x08"],
    "goes on after the exit": [STARTED, EXITED, bytes(RunResponse(stdout=b"x"))],
    "exits twice": [STARTED, EXITED, EXITED],
}


async def to_the_end(agent: AgentClient) -> None:
    async with agent.run(START) as command:
        async for _ in command:
            pass
        await command.finished()


@pytest.mark.parametrize("what", RUNS)
async def test_run(what: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.send(peer.headers(stream))
        for message in RUNS[what]:
            framed = grpc_message(message)
            await peer.send(*(data(stream, framed[at : at + 16384]) for at in range(0, len(framed), 16384)))
        await peer.send(peer.headers(stream, OK_TRAILERS, end=True))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            with pytest.raises(AgentProtocolError) as raised:
                await to_the_end(agent)
            with pytest.raises(AgentProtocolError):
                await agent.stats()
    assert str(raised.value).isprintable()


async def test_output_before_the_connection_ends_is_not_lost() -> None:
    pieces = [RunResponse(stdout=b"a" * 60_000), RunResponse(stderr=b"b"), RunResponse(stdout=b"c" * 60_000)]

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, STARTED, trailers=None)
        for piece in pieces:
            framed = grpc_message(bytes(piece))
            await peer.send(*(data(stream, framed[at : at + 16384]) for at in range(0, len(framed), 16384)))

    got: list[OutputEvent] = []

    async def collect(command: RunStream) -> None:
        async for event in command:
            got.append(event)

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(START) as command:
            await anyio.sleep(0.05)     # the end arrives before anything is taken
            with pytest.raises(AgentLostError):
                await collect(command)
    assert got == [Stdout(b"a" * 60_000), Stderr(b"b"), Stdout(b"c" * 60_000)]


async def test_refused_after_output() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        messages = [STARTED, bytes(RunResponse(stdout=b"x"))]
        await peer.answer(await peer.request(), *messages, trailers=status(b"13", b"waitpid"))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(START) as command:
            assert await command.started() == 1
            assert await anext(command) == Stdout(b"x")
            with pytest.raises(AgentRefusedError, match="waitpid"):
                await anext(command)


async def test_answers_in_an_unusual_form() -> None:
    """Fields that are unknown, or in another order or more bytes than needed, are no fault: v1 may grow."""
    unknown = b"\x9a\x06\x03new"
    messages = [STARTED + unknown, b"\x12\x83\x00abc", b"\x1a\x01e" + unknown, EXITED + unknown]

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.answer(await peer.request(), *messages)
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(START) as command:
            assert [event async for event in command] == [Stdout(b"abc"), Stderr(b"e"), Exited(0)]
            await command.finished()
