"""Whatever bytes arrive, in whatever pieces: output comes out as it went in, or there is one typed error."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import hpack
from betterproto2 import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from pykata.agent.channel import Channel
from pykata.agent.client import AgentClient, Ended, Exited, OutputEvent, Room, Stderr, Stdout
from pykata.agent.guard import BURST, FrameGuard
from pykata.agent.run import stdio
from pykata.agent.start import encoded_start
from pykata.agent.stream import frame as grpc_message
from pykata.agent.stream import varint
from pykata.agent.typed import decoded
from pykata.agent.v1 import (
    CreateContainerRequest,
    InspectResponse,
    Process,
    ProcessTool,
    Rlimit,
    RunRequest,
    RunResponse,
    SetupResponse,
    Start,
    Started,
    StatsResponse,
    Terminal,
)
from pykata.agent.v1 import Ended as EndedMessage
from pykata.agent.v1 import Exited as ExitedMessage
from pykata.errors import AgentError, AgentProtocolError
from tests.agent.peer import OK_HEADERS, OK_TRAILERS

GREETING = b"\0\0\0\4\0\0\0\0\0"
START = Start(container_id="c", process=Process(id="p", args=["true"]))


class Wire(asyncio.Transport):
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.aborted = False

    def write(self, data: Any) -> None:
        self.sent += data

    def abort(self) -> None:
        self.aborted = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


def connected() -> Channel:
    channel = Channel()
    channel.connection_made(Wire())
    return channel


def feed(channel: Channel, data: bytes, sizes: list[int] | None = None) -> None:
    """Let ``data`` arrive, cut at these sizes, over and over."""
    at, turn = 0, 0
    while at < len(data) and not channel.has_failed:
        view = channel.get_buffer(-1)
        size = min(len(view), sizes[turn % len(sizes)] if sizes else len(data), len(data) - at)
        view[:size] = data[at : at + size]
        channel.buffer_updated(size)
        at += size
        turn += 1


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


frames = st.builds(
    frame,
    st.integers(0, 12) | st.sampled_from([0, 0, 1, 1, 3, 4, 8, 9]),
    st.integers(0, 255) | st.sampled_from([0, 1, 4, 5]),
    st.sampled_from([0, 1, 1, 1, 2, 3, 5, 2**31 - 1]),
    st.binary(max_size=40) | st.sampled_from([
        bytes(4), bytes(8), b"\x00\x04\x00\x00\xff\xff", b"\x88", b"\x88\x5f\x10application/grpc",
        b"\0\0\0\0\2\x12\0", b"\0\0\0\0\4\x0a\2\x08\1", b"\0\xff\xff\xff\xff", b"\1\0\0\0\0",
    ]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.booleans(), st.lists(frames | st.binary(max_size=60), max_size=20), st.lists(st.integers(1, 70), max_size=4))
def test_arbitrary_bytes(greets: bool, pieces: list[bytes], sizes: list[int]) -> None:
    async def main() -> None:
        channel = connected()
        agent = AgentClient(channel)
        async with agent.run(START) as command:     # stream 1
            feed(channel, (GREETING if greets else b"") + b"".join(pieces), sizes)
            channel.connection_lost(None)
            with suppress(AgentError):
                async for event in command:
                    assert isinstance(event, Stdout | Stderr | Exited | Ended)
        assert not channel._streams

    asyncio.run(main())


pieces_of_output = st.lists(
    st.builds(Stdout, st.binary(min_size=1, max_size=200))
    | st.builds(Stderr, st.binary(min_size=1, max_size=200))
    | st.builds(Stdout, st.integers(1, 65536).map(bytes)),
    max_size=12,
)
ends = st.builds(Exited, st.integers(0, 255)) | st.builds(
    lambda number, oom: Exited(128 + number, number, oom), st.integers(1, 64), st.booleans()
)


def encoded(event: OutputEvent) -> bytes:
    match event:
        case Stdout(data):
            return bytes(RunResponse(stdout=data))
        case Stderr(data):
            return bytes(RunResponse(stderr=data))
        case Exited(code, number, oom):
            return bytes(RunResponse(exited=ExitedMessage(exit_code=code, signal=number, oom_killed=oom)))
        case Ended(stdout, stderr):
            return bytes(RunResponse(ended=EndedMessage(stdout=stdout, stderr=stderr)))
        case Room(size):
            return bytes(RunResponse(stdin_window=size))


def answer(stream: int, events: list[OutputEvent], cuts: list[int]) -> list[bytes]:
    """The frames of a whole answer, its messages cut into DATA frames at these sizes."""
    body = b"".join(map(grpc_message, [bytes(RunResponse(started=Started(pid=stream))), *map(encoded, events)]))
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    out = [frame(1, 4, stream, encoder.encode(OK_HEADERS))]
    at, turn = 0, 0
    while at < len(body):
        size = cuts[turn % len(cuts)]
        out.append(frame(0, 0, stream, body[at : at + size]))
        at += size
        turn += 1
    return [*out, frame(1, 5, stream, encoder.encode(OK_TRAILERS))]


@settings(max_examples=100, deadline=None)
@given(
    pieces_of_output, ends, pieces_of_output, ends, st.randoms(use_true_random=False),
    st.lists(st.integers(1, 20000), min_size=1, max_size=5).filter(lambda cuts: sum(cuts) > 2000 * len(cuts)),
    st.lists(st.integers(1, 100_000), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 2000 * len(sizes)),
)  # fmt: skip
def test_arbitrary_chunking(
    first: list[OutputEvent], first_end: Exited, second: list[OutputEvent], second_end: Exited, random: Any,
    cuts: list[int], sizes: list[int],
) -> None:  # fmt: skip
    """Two commands, their frames interleaved, the bytes cut anywhere: each gives exactly what it wrote."""
    outputs = {1: [*first, first_end], 3: [*second, second_end]}
    queues = {stream: answer(stream, list(events), cuts) for stream, events in outputs.items()}
    got: dict[int, list[OutputEvent]] = {1: [], 3: []}

    async def main() -> None:
        channel = connected()
        agent = AgentClient(channel)
        async with agent.run(START) as one, agent.run(START) as two, asyncio.TaskGroup() as group:

            async def read(stream: int) -> None:
                command = {1: one, 3: two}[stream]
                assert await command.started() == stream
                async for event in command:
                    got[stream].append(event)
                await command.finished()

            readers = [group.create_task(read(stream)) for stream in outputs]
            feed(channel, GREETING)
            while waiting := [queue for queue in queues.values() if queue]:
                feed(channel, random.choice(waiting).pop(0), sizes)
                await asyncio.sleep(0)      # the readers keep up with their windows
                await asyncio.sleep(0)
            await asyncio.wait(readers)
        channel.check()

    asyncio.run(main())
    assert got == outputs


news = st.builds(Room, st.integers(1, 1000)) | st.builds(Ended, st.booleans(), st.booleans())


@settings(max_examples=200, deadline=None)
@given(pieces_of_output.flatmap(lambda output: st.tuples(st.just(output), st.lists(news, max_size=6))), ends, st.data())
def test_windows(given_: tuple[list[OutputEvent], list[OutputEvent]], end: Exited, chance: st.DataObject) -> None:
    """Output, ends of streams and room for input in any order: what may be is passed on, and nothing else is."""
    events: list[OutputEvent] = chance.draw(st.permutations([*given_[0], *given_[1]]))
    window = chance.draw(st.integers(1, 300_000))
    start = Start(container_id="c", process=Process(id="p", args=["true"]), window=window)

    # What an agent may do, in other words than the code's.
    good: list[OutputEvent] = []
    left, over = {Stdout: window, Stderr: window}, {Stdout: False, Stderr: False}
    for event in [*events, end]:
        if isinstance(event, Stdout | Stderr):
            left[type(event)] -= len(event.data)
            if left[type(event)] < 0 or over[type(event)]:
                break
        if isinstance(event, Ended):
            over[Stdout] |= event.stdout
            over[Stderr] |= event.stderr
        good.append(event)
    got: list[OutputEvent] = []

    async def main() -> None:
        channel = connected()
        async with AgentClient(channel).run(start) as command:
            feeding = asyncio.create_task(arrive(channel))
            try:
                async for event in command:
                    got.append(event)
            except AgentProtocolError:
                assert end not in good
            finally:
                await feeding

    async def arrive(channel: Channel) -> None:
        feed(channel, GREETING)
        for piece in answer(1, [*events, end], [16_384]):
            feed(channel, piece)
            await asyncio.sleep(0)      # the reader keeps up with its window
            await asyncio.sleep(0)

    asyncio.run(main())
    assert got == good


@given(st.binary(min_size=1, max_size=300) | st.integers(1, 70_000).map(bytes))
def test_fast_decoding_is_the_same(data: bytes) -> None:
    assert stdio(bytes(RunResponse(stdout=data))) == Stdout(data)
    assert stdio(bytes(RunResponse(stderr=data))) == Stderr(data)


@given(st.binary(max_size=30))
def test_fast_decoding_of_anything(data: bytes) -> None:
    if event := stdio(data):
        message = RunResponse.parse(data)
        assert event.data == (message.stdout if isinstance(event, Stdout) else message.stderr)


# A few fields, each with a number and a wire type as they come, and whatever follows.
fields = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 1, 2, 5]), st.binary(max_size=8)), max_size=4).map(
    lambda parts: b"".join(
        bytes([number << 3 | kind]) + (bytes([len(rest)]) if kind == 2 else b"") + rest for number, kind, rest in parts
    )
)


@given(st.sampled_from([SetupResponse, StatsResponse, InspectResponse, RunResponse]), st.binary(max_size=60) | fields)
def test_decoding_of_anything(kind: type[Message], data: bytes) -> None:
    """Bytes are no message, or one whose values have the types of their fields."""
    try:
        message = decoded(kind, data)
    except ValueError:
        return
    assert bytes(message) is not None           # what the types promise is enough to write it again
    for name in ("memory_total", "now_ns", "written"):
        assert isinstance(getattr(message, name, 0), int)
    assert isinstance(getattr(message, "agent_version", ""), str)
    assert all(isinstance(each.pids, int) for each in getattr(message, "containers", {}).values())


@given(st.integers(1, 70_000))
def test_varint(size: int) -> None:
    assert b"\x12" + varint(size) + bytes(size) == bytes(RunRequest(stdin=bytes(size)))


@given(st.lists(frames, max_size=30), st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_guard_sees_the_same_in_any_pieces(pieces: list[bytes], sizes: list[int]) -> None:
    def verdict(cuts: list[int]) -> str:
        guard = FrameGuard(lambda *_: None, clock=lambda: 0.0)
        guard.stream_opened(1)
        data, at, turn = GREETING + b"".join(pieces), 0, 0
        try:
            while at < len(data):
                size = cuts[turn % len(cuts)]
                guard.feed(data[at : at + size])
                at += size
                turn += 1
        except AgentProtocolError as exc:
            return str(exc)
        return ""

    assert verdict(sizes) == verdict([1_000_000])


def test_guard_lets_time_and_work_pass() -> None:
    now = 0.0
    guard = FrameGuard(lambda *_: None, clock=lambda: now)
    guard.feed(GREETING)
    ping = frame(6, 0, 0, bytes(8))
    for _ in range(20):
        now += BURST / 100          # a bucket full of PINGs in the time that fills it
        guard.feed(ping * int(BURST - 1))
    for number in range(20_000):    # calls and their answers, in no time
        stream = 2 * number + 1
        guard.stream_opened(stream)
        guard.feed(frame(1, 4, stream, b"") + frame(0, 0, stream, b"x") + frame(1, 5, stream, b""))
    guard.stream_opened(50_001)
    for _ in range(20_000):         # much data, and a WINDOW_UPDATE for each
        guard.feed(frame(0, 0, 50_001, bytes(2000)) + frame(8, 0, 50_001, bytes(4)))


TEXTS = st.lists(st.text(max_size=200), max_size=5)
SIZES = st.integers(0, 2**32 - 1)
PROCESSES = st.builds(
    Process, id=st.text(), args=TEXTS, env=TEXTS, cwd=st.text(), user=st.text(), tool=st.sampled_from(ProcessTool),
    rlimits=st.lists(st.builds(Rlimit, type=st.text(), soft=SIZES, hard=SIZES), max_size=2),
    terminal=st.none() | st.builds(Terminal, rows=SIZES, cols=SIZES),
)  # fmt: skip


@given(
    st.builds(
        Start, container_id=st.text(), process=st.none() | PROCESSES, window=SIZES, detached=st.booleans(), log=SIZES,
        stdin_closed=st.booleans(), last=st.booleans(), collected=st.booleans(),
        bulk=st.integers(0, 2**31 - 1),
        create=st.none() | st.builds(CreateContainerRequest, id=st.text()),
    )
)  # fmt: skip
def test_a_start_is_encoded_whole(start: Start) -> None:
    assert RunRequest.parse(encoded_start(start)) == RunRequest(start=start)
