"""Output in bulk frames: from an agent that keeps to the rules, and from those that don't."""

from __future__ import annotations

import random

import anyio
import pytest
from hyperframe.frame import ExtensionFrame
from hypothesis import given
from hypothesis import strategies as st

from pykata.agent import bulk
from pykata.agent.bulk import Stderr, Stdout
from pykata.agent.client import Ended, Exited, Room, RunStream
from pykata.agent.guard import FrameGuard
from pykata.agent.stream import frame as grpc_message
from pykata.agent.v1 import Ended as EndedMessage
from pykata.agent.v1 import Exited as ExitedMessage
from pykata.agent.v1 import Process, RunResponse, Start, Started
from pykata.errors import AgentError, AgentLostError, AgentProtocolError
from tests.agent.peer import OK_TRAILERS, Peer, data, facing

pytestmark = pytest.mark.usefixtures("bounded_memory")

GUARD = 300.0                    # seconds; only a hang takes that long
WINDOW = 64 * 1024
STARTED = RunResponse(started=Started(pid=1))
BEGINS = RunResponse(bulk=EndedMessage(stdout=True))
EXITED = RunResponse(exited=ExitedMessage())
STDOUT, STDERR = 0, 1


def bulk_frame(stream: int, payload: bytes, flag: int = STDOUT) -> bytes:
    return len(payload).to_bytes(3) + bytes((bulk.KIND, flag)) + stream.to_bytes(4) + payload


def says(stream: int, message: RunResponse) -> bytes:
    framed: bytes = data(stream, grpc_message(bytes(message))).serialize()
    return framed


def start(window: int = WINDOW) -> Start:
    return Start(container_id="c", process=Process(id="p", args=["true"]), window=window)


async def taken(command: RunStream) -> list[object]:
    """All events, each piece of output given back as room."""
    events: list[object] = []
    async for event in command:
        match event:
            case Stdout(piece):
                command.took("stdout", len(piece))
            case Stderr(piece):
                command.took("stderr", len(piece))
        events.append(event)
    return events


async def answered(
    *pieces: RunResponse | tuple[int, bytes] | bytes, cut: int = 0, window: int = WINDOW
) -> list[object]:
    """What a command is told of an agent that sends these messages and bulk frames, in writes of ``cut`` bytes."""

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(STARTED), trailers=None)
        out = b"".join(
            says(stream, piece) if isinstance(piece, RunResponse)
            else bulk_frame(stream, piece[1], piece[0]) if isinstance(piece, tuple) else piece
            for piece in pieces
        )  # fmt: skip
        async with anyio.create_task_group() as group:
            group.start_soon(peer.drain)
            for at in range(0, len(out), cut or len(out)):
                await peer.send(out[at : at + (cut or len(out))])
                if cut:
                    await anyio.lowlevel.checkpoint()
            if pieces and pieces[-1] is EXITED:
                await peer.send(peer.headers(stream, OK_TRAILERS, end=True))

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(start(window)) as command:
            try:
                await command.started()
                return await taken(command)
            except AgentError as error:
                failure = error         # out of the agent's task group, which would wrap it
    raise failure


def joined(events: list[object], kind: type[Stdout] | type[Stderr]) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, kind))


@pytest.mark.parametrize("cut", [0, 1, 7, 100])
async def test_a_stream_goes_on_in_bulk(cut: int) -> None:
    events = await answered(
        RunResponse(stdout=b"one "), RunResponse(stderr=b"err"), BEGINS, (STDOUT, b"two "), RunResponse(stderr=b"or"),
        (STDOUT, b"three"), RunResponse(ended=EndedMessage(stdout=True)), RunResponse(stderr=b"!"), EXITED, cut=cut,
    )  # fmt: skip
    assert joined(events, Stdout) == b"one two three"
    assert joined(events, Stderr) == b"error!"
    assert events[-1] == Exited(0)
    ended = events.index(Ended(stdout=True))
    assert not any(isinstance(event, Stdout) for event in events[ended:])


async def test_a_frame_may_overtake_its_announcement() -> None:
    events = await answered((STDOUT, b"two"), RunResponse(stdout=b"one "), BEGINS, (STDOUT, b" three"), EXITED)
    assert joined(events, Stdout) == b"one two three"


async def test_both_streams_at_once() -> None:
    both = RunResponse(bulk=EndedMessage(stdout=True, stderr=True))
    pieces = [(random.Random(1).choice((STDOUT, STDERR)), bytes([n]) * 50) for n in range(200)]
    events = await answered(both, *pieces, EXITED, cut=333)
    for kind, flag in ((Stdout, STDOUT), (Stderr, STDERR)):
        assert joined(events, kind) == b"".join(piece for which, piece in pieces if which == flag)


async def test_what_is_taken_makes_room_for_more() -> None:
    """More than any window goes through, and the window is larger from when it has begun."""

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(STARTED), trailers=None)
        async with anyio.create_task_group() as group:
            group.start_soon(peer.drain)
            await peer.send(says(stream, BEGINS))
            for _ in range(64):
                await peer.send(bulk_frame(stream, bytes(bulk.LONGEST)))
                await read.wait()
            await peer.send(says(stream, EXITED), peer.headers(stream, OK_TRAILERS, end=True))

    read, size = anyio.Event(), 0
    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(start(bulk.LONGEST)) as command:
            async for event in command:
                if isinstance(event, Stdout):
                    size += len(event.data)
                    command.took("stdout", len(event.data))
                    read.set()
    assert size == 64 * bulk.LONGEST


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([BEGINS, *[(STDOUT, bytes(bulk.LONGEST))] * 17], "wasn't allowed"),
        ([(STDOUT, bytes(WINDOW)), (STDOUT, b"x")], "wasn't allowed"),
        ([BEGINS, (STDERR, bytes(WINDOW)), (STDERR, b"x")], "wasn't allowed"),
        ([BEGINS, BEGINS], "nobody asked for"),
        ([BEGINS, RunResponse(stdout=b"x")], "after it had begun"),
        ([RunResponse(ended=EndedMessage(stdout=True)), BEGINS], "nobody asked for"),
        ([(STDOUT, b"x"), EXITED], "before the last of its output"),
        ([(2, b"x")], "flags"),
        ([(STDOUT, b"")], "of 0 bytes"),
        ([(STDOUT, bytes(bulk.LONGEST + 1))], "announced a frame"),
        ([bulk_frame(77, b"x")], "which isn't open"),
        ([bulk_frame(2, b"x")], "opened a stream"),
    ],
)  # fmt: skip
async def test_what_breaks_the_rules(pieces: list[RunResponse | tuple[int, bytes] | bytes], complaint: str) -> None:
    with pytest.raises(AgentProtocolError, match=complaint):
        await answered(*pieces)


async def test_a_call_without_windows_has_no_bulk() -> None:
    with pytest.raises(AgentProtocolError, match="nobody asked for"):
        await answered((STDOUT, b"x"), window=0)


async def test_an_end_within_a_frame() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(STARTED), bytes(BEGINS), trailers=None)
        await peer.send(bulk_frame(stream, bytes(100))[:50])

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(start()) as command:
            await command.started()
            with pytest.raises(AgentLostError):
                await taken(command)


async def test_something_after_the_end_of_a_stream() -> None:
    ended = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        end = RunResponse(ended=EndedMessage(stdout=True))
        await peer.answer(stream, bytes(STARTED), bytes(BEGINS), bytes(end), trailers=None)
        await ended.wait()
        await peer.send(bulk_frame(stream, b"more"))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(start()) as command:
            assert await anext(command) == Ended(stdout=True)
            ended.set()
            with pytest.raises(AgentProtocolError, match="after its end"):
                await taken(command)


async def test_a_flood_of_tiny_frames_nobody_reads() -> None:
    """It costs the memory of its bytes, and ends at the window."""
    with pytest.raises(AgentProtocolError, match="wasn't allowed"):
        await answered(bulk_frame(1, b"x") * (WINDOW + 1))


async def test_frames_of_a_call_that_was_left() -> None:
    """They may be under way; the next call isn't bothered."""
    left = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        first = await peer.request()
        await peer.answer(first, bytes(STARTED), trailers=None)
        await left.wait()
        second = await peer.request()
        await peer.send(bulk_frame(first, bytes(1000)))
        await peer.answer(second, bytes(STARTED), bytes(EXITED))

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            async with agent.run(start()) as command:
                await command.started()
            left.set()
            async with agent.run(start()) as command:
                assert await taken(command) == [Exited(0)]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), max_size=12), st.integers(1, 90))
def test_bulk_and_http2_are_told_apart(frames: list[tuple[bool, int]], cut: int) -> None:
    taken: list[bytes] = []
    guard = FrameGuard(lambda stream, flag, data: taken.append(data))
    guard.stream_opened(1)
    settings = bytes(3) + b"\4\0" + bytes(4)
    http2, much, out = settings, b"", settings
    for is_bulk, size in frames:
        payload = random.Random(size).randbytes(size)
        if is_bulk:
            out += bulk_frame(1, payload)
            much += payload
        else:
            whole = data(1, payload).serialize()
            out += whole
            http2 += whole
    rest = b""
    for at in range(0, len(out), cut):
        piece = out[at : at + cut]
        rest += guard.feed(piece[guard.take_bulk(memoryview(piece)) :])[0]
    assert b"".join(taken) == much
    assert rest == http2


async def test_stdin_in_bulk_waits_for_room() -> None:
    """What was allowed goes at once, in frames of the call's number; the rest when the agent says so."""
    data_of, more = bytearray(), anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(STARTED), trailers=None)
        while len(data_of) < bulk.STDIN_WINDOW + 5:
            frame = await peer.read_frame()
            if isinstance(frame, ExtensionFrame):
                assert (frame.type, frame.flag_byte, frame.stream_id) == (bulk.KIND, bulk.STDIN, stream)
                assert len(frame.body) <= bulk.STDIN_PIECE
                data_of.extend(frame.body)
                if len(data_of) == bulk.STDIN_WINDOW:
                    more.set()
                    await peer.send(says(stream, RunResponse(stdin_window=5)))
        await peer.send(says(stream, EXITED), peer.headers(stream, OK_TRAILERS, end=True))
        await peer.drain()

    sent = random.Random(1).randbytes(bulk.STDIN_WINDOW + 100)
    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(start()) as command:
            await command.started()
            view = memoryview(sent)
            while size := await command.send_some(view):
                view = view[size:]
            assert len(view) == 100, "the room that there is at first"
            await more.wait()
            assert await anext(command) == Room(5)
            assert await command.send_some(view) == 5
            assert await taken(command) == [Exited(0)]
    assert bytes(data_of) == sent[: bulk.STDIN_WINDOW + 5]


async def test_stdin_that_began_by_grpc_goes_on_so() -> None:
    """Before the process runs nobody knows where bulk frames belong, and one way would overtake the other."""
    received = bytearray()

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        while b"before" not in received:
            frame = await peer.read_frame()
            received.extend(getattr(frame, "data", b""))
        await peer.answer(stream, bytes(STARTED), trailers=None)
        while b"after" not in received:
            frame = await peer.read_frame()
            assert not isinstance(frame, ExtensionFrame)
            received.extend(getattr(frame, "data", b""))
        await peer.send(says(stream, EXITED), peer.headers(stream, OK_TRAILERS, end=True))

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, agent.run(start()) as command:
            assert await command.send_some(memoryview(b"before"))
            await command.started()
            assert await command.send_some(memoryview(b"after"))
            assert await taken(command) == [Exited(0)]
