"""Data that goes to the guest beside the port: to an agent that keeps to the rules, and to those that don't."""

from __future__ import annotations

import hashlib
import os
import random
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest
from hyperframe.frame import ExtensionFrame, HeadersFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from pykata.agent import bulk, staging
from pykata.agent.client import AgentClient, Room, RunStream
from pykata.agent.run import PIECE
from pykata.agent.staging import AHEAD, BLOCK, CLOSE, LEAST, MUCH, OPEN, PIECES, REFUSED, SYNC
from pykata.agent.v1 import Process, RunResponse, Start, Started
from pykata.errors import AgentError, AgentProtocolError
from pykata.spec import LentSlot
from tests.agent.peer import Peer, facing
from tests.agent.test_bulk import GUARD, bulk_frame, says
from tests.cancellation import Way, cancel_everywhere

STARTED = bytes(RunResponse(started=Started(pid=1)))
WORTH_SAYING = bulk.STDIN_WINDOW // 4
BORDERS = (1, *(border + by for border in (BLOCK, LEAST, staging.PIECE) for by in (-1, 0, 1)), 600_000)
NOISE = random.Random(1).randbytes(MUCH + 4 * 700_000)


class Machine:
    """One slot, and an agent that takes stdin of all calls in whichever way it comes."""

    def __init__(
        self, *, silent: bool = False, refuses: bool = False, reads: Callable[[int], bool] = lambda stream: True,
    ) -> None:  # fmt: skip
        self.stdin: defaultdict[int, bytearray] = defaultdict(bytearray)
        self.asked: list[bytes] = []
        self.pieces = 0
        self.slots: list[LentSlot] = []
        self.recall: Callable[[], None]
        self.has_slot = True
        self._memory = -1
        self.silent = silent
        self._refuses = refuses
        self._reads = reads
        self._room: defaultdict[int, int] = defaultdict(int)
        self._left: list[tuple[int, int, int]] = []     # in the disk, for streams that nobody reads

    @asynccontextmanager
    async def lend(self, memory: int, recall: Callable[[], None]) -> AsyncIterator[LentSlot | None]:
        if not self.has_slot:
            yield None
            return
        self.has_slot, self._memory, self.recall = False, memory, recall
        self.slots.append(slot := LentSlot("slot7"))
        try:
            yield slot
        finally:
            self._memory, self.has_slot = -1, True

    async def agent(self, peer: Peer) -> None:
        await peer.greet()
        while True:
            frame = await peer.read_frame()
            if isinstance(frame, HeadersFrame):
                await peer.answer(frame.stream_id, STARTED, trailers=None)
            elif isinstance(frame, ExtensionFrame) and frame.type == bulk.KIND:
                await self._take(peer, frame.flag_byte, frame.stream_id, bytes(frame.body))

    def _read_left(self, calls: list[int]) -> None:
        for left in self._left.copy():
            call, offset, size = left
            if not calls or call in calls:
                self.stdin[call] += os.pread(self._memory, size, offset)
                self._left.remove(left)

    async def _take(self, peer: Peer, flag: int, stream: int, body: bytes) -> None:
        if flag == bulk.STAGED and not stream:
            self.asked.append(body)
            left = [int.from_bytes(body[at : at + 4]) for at in range(1, len(body), 4)] if body[:1] == SYNC else []
            self._read_left(left)
            if not self.silent:
                said = REFUSED if self._refuses and body[:1] == OPEN else body[:1]
                await peer.send(bulk_frame(0, said, bulk.STAGING_DONE))
            return
        if flag == bulk.STAGED:
            offset, size = int.from_bytes(body[:4]) * BLOCK, int.from_bytes(body[4:])
            assert size % BLOCK == 0
            assert LEAST <= size <= staging.PIECE
            self.pieces += 1
            if not self._reads(stream):
                self._left.append((stream, offset, size))
                return
            body = os.pread(self._memory, size, offset)
        self.stdin[stream] += body
        self._room[stream] += len(body)
        if self._room[stream] >= WORTH_SAYING and self._reads(stream):
            await peer.send(says(stream, RunResponse(stdin_window=self._room.pop(stream))))


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def start(number: int = 1) -> Start:
    return Start(container_id="c", process=Process(id=f"p{number}", args=["true"]), window=64 * 1024)


@asynccontextmanager
async def command(agent: AgentClient, number: int = 1) -> AsyncIterator[RunStream]:
    async with agent.run(start(number)) as running:
        await running.started()
        yield running


async def send(running: RunStream, data: bytes) -> None:
    view = memoryview(data)
    while view:
        if not running.stdin_room:
            assert isinstance(await anext(running), Room)
        else:
            view = view[await running.send_some(view) :]


async def until(there: Callable[[], bool]) -> None:
    while not there():
        await anyio.lowlevel.checkpoint()


def way(agent: AgentClient) -> staging.Staging:
    found = agent._channel.staging
    assert found is not None
    return found


async def opened(agent: AgentClient, running: RunStream) -> None:
    """Send as much as it takes to have a slot borrowed, and something more."""
    await send(running, NOISE[: MUCH + 1])
    await send(running, NOISE[MUCH + 1 :][:1])
    await until(lambda: way(agent).is_open)


@given(sizes=st.lists(st.sampled_from(BORDERS) | st.integers(1, 600_000), max_size=4))
@settings(max_examples=25)
async def test_it_arrives_whole_and_in_order(sizes: list[int]) -> None:
    machine, at = Machine(), MUCH + 2
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent, command(agent) as running:
            await opened(agent, running)
            for size in sizes:
                await send(running, NOISE[at : at + size])
                at += size
            await until(lambda: len(machine.stdin[1]) == at)
            assert machine.stdin[1] == memoryview(NOISE)[:at]
            assert machine.pieces or not any(size >= 2 * PIECE for size in sizes)


async def test_a_reader_that_stalls_holds_up_nobody() -> None:
    machine = Machine(reads=lambda stream: stream != 3)
    data = NOISE[:MUCH]
    with anyio.fail_after(GUARD):
        async with (
            facing(machine.agent, lend=machine.lend) as agent, command(agent, 1) as first, command(agent, 2) as stalled,
        ):  # fmt: skip
            await opened(agent, first)
            stalled._stdin_sent = stalled._stdin_taken = MUCH      # as one that has brought much before
            while stalled.stdin_room:
                assert await stalled.send_some(memoryview(data)) == staging.PIECE
            await send(first, data)
            await until(lambda: len(machine.stdin[1]) == MUCH + 2 + len(data))
            assert machine.stdin[1][MUCH + 2 :] == data
            await agent.rest()
            assert machine.stdin[3] == data[: staging.PIECE] * (AHEAD // staging.PIECE)


class Lazy(Machine):
    """Its process reads as late as may be: so much of what was sent is left where it is."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self._ahead = random.Random(least).choices((least, most), k=1000)
        self._queue: deque[tuple[bool, int, bytes]] = deque()       # beside the port, the size, where or what it is
        self._gone = 0

    async def _take(self, peer: Peer, flag: int, stream: int, body: bytes) -> None:
        if stream:
            is_staged = flag == bulk.STAGED
            self.pieces += is_staged
            self._queue.append((is_staged, int.from_bytes(body[4:]) if is_staged else len(body), body))
            assert sum(size for staged, size, _ in self._queue if not staged) <= bulk.STDIN_WINDOW
            assert sum(size for staged, size, _ in self._queue if staged) <= AHEAD
            self.read(self._ahead.pop())
        else:
            self.read(0)
            await super()._take(peer, flag, stream, body)
        if self._gone >= bulk.STDIN_SAID:
            gone, self._gone = self._gone, 0
            await peer.send(says(1, RunResponse(stdin_window=gone)))

    def read(self, left: int) -> None:
        """All but so much."""
        while self.waiting > left:
            is_staged, size, body = self._queue.popleft()
            self.stdin[1] += os.pread(self._memory, size, int.from_bytes(body[:4]) * BLOCK) if is_staged else body
            self._gone += size

    @property
    def waiting(self) -> int:
        return sum(size for _, size, _ in self._queue)


@given(
    sizes=st.lists(st.sampled_from((1, LEAST - 1, LEAST, 256 * 1024, staging.PIECE, 600_000)), min_size=2, max_size=20),
    least=st.integers(0, 256 * 1024), most=st.integers(0, 256 * 1024), recall=st.integers(0, 20),
)  # fmt: skip
@settings(max_examples=30)
async def test_a_piece_is_not_used_again_before_its_process_has_it(
    sizes: list[int], least: int, most: int, recall: int
) -> None:
    machine, sent = Lazy(least, most), bytearray()
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent, command(agent) as running:
            await opened(agent, running)
            sent += NOISE[: MUCH + 2]
            for number, size in enumerate(sizes):
                if number == recall:
                    machine.recall()
                data = NOISE[number : number + size]
                await send(running, data)
                sent += data
            await agent.rest()
            await until(lambda: machine.waiting + len(machine.stdin[1]) == len(sent))
            machine.read(0)
            assert digest(machine.stdin[1]) == digest(sent)


async def test_where_all_pieces_wait_it_goes_by_the_port() -> None:
    machine = Machine(reads=lambda stream: stream == 1)
    with anyio.fail_after(GUARD):
        async with AsyncExitStack() as stack:
            agent = await stack.enter_async_context(facing(machine.agent, lend=machine.lend))
            first = await stack.enter_async_context(command(agent))
            await opened(agent, first)
            for number in range(PIECES * staging.PIECE // AHEAD):
                stalled = await stack.enter_async_context(command(agent, 2 + number))
                stalled._stdin_sent = stalled._stdin_taken = MUCH
                while stalled.stdin_room:
                    await stalled.send_some(memoryview(NOISE)[: staging.PIECE])
            assert not way(agent).has_room
            await send(first, NOISE[:MUCH])
            await until(lambda: len(machine.stdin[1]) == 2 * MUCH + 2)
            assert machine.stdin[1] == NOISE[: MUCH + 2] + NOISE[:MUCH]
            assert machine.pieces == PIECES


async def test_without_a_slot_it_goes_by_the_port() -> None:
    machine = Machine()
    machine.has_slot = False
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent, command(agent) as running:
            await send(running, NOISE)
            await until(lambda: len(machine.stdin[1]) == len(NOISE))
            assert machine.stdin[1] == NOISE
            assert not machine.pieces
            assert not machine.asked


async def test_a_slot_that_is_wanted_back_is_given_back() -> None:
    machine = Machine()
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent, command(agent) as running:
            await opened(agent, running)
            at = MUCH + 2
            await send(running, NOISE[at : at + MUCH])
            await until(lambda: bool(machine.pieces))
            machine.recall()
            await until(lambda: machine.has_slot)
            assert machine.asked == [OPEN + b"slot7", CLOSE]
            assert not machine.slots[0].is_lost
            pieces = machine.pieces
            await agent.rest()
            await send(running, NOISE[at + MUCH :])
            await until(lambda: len(machine.stdin[1]) == len(NOISE))
            assert machine.stdin[1] == NOISE
            assert machine.pieces == pieces


async def test_one_that_was_wanted_back_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "RETRY", 0.0)
    machine = Machine()
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent, command(agent) as running:
            await opened(agent, running)
            machine.recall()
            await until(lambda: machine.has_slot)
            await send(running, NOISE[:LEAST])
            await until(lambda: way(agent).is_open)
            await agent.rest()
            agent.go_on()
            await send(running, NOISE[:LEAST])
            await until(lambda: way(agent).is_open)
            assert len(machine.slots) == 3


async def test_what_the_agent_had_to_read_counts_until_processes_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "RETRY", 0.0)
    machine = Machine(reads=lambda stream: stream == 1)
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent, command(agent) as first:
            await opened(agent, first)
            async with AsyncExitStack() as stack:
                for number in range(2 * PIECES * staging.PIECE // AHEAD):
                    stalled = await stack.enter_async_context(command(agent, 2 + number))
                    stalled._stdin_sent = stalled._stdin_taken = MUCH
                    way(agent).want()
                    await until(lambda: way(agent).is_open or way(agent).is_idle)
                    while stalled.stdin_room:
                        await stalled.send_some(memoryview(NOISE)[: staging.PIECE])
                    machine.recall()
                    await until(lambda: way(agent).is_idle)
                assert machine.pieces == PIECES
                way(agent).want()
                assert way(agent).is_idle
            await send(first, NOISE[:LEAST])
            await until(lambda: way(agent).is_open)
            assert way(agent).has_room


async def test_the_last_call_that_sends_much_gives_it_back() -> None:
    machine = Machine()
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent:
            async with command(agent, 1) as first:
                await opened(agent, first)
                async with command(agent, 2) as second:
                    await send(second, NOISE[: MUCH + LEAST])
                    await send(second, NOISE[:LEAST])
                assert way(agent).is_open
            assert machine.has_slot
            assert machine.asked[-1] == CLOSE
            assert not machine.slots[0].is_lost


async def test_a_call_is_left_while_the_agent_says_nothing() -> None:
    machine = Machine()
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent:
            with anyio.CancelScope() as scope:
                async with command(agent) as running:
                    await opened(agent, running)
                    machine.silent = True
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()
            assert not machine.has_slot
            await until(lambda: machine.asked[-1] == CLOSE)
            assert not machine.has_slot
        assert machine.has_slot
        assert machine.slots[0].is_lost


async def test_an_agent_that_refuses_is_not_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "RETRY", 1e9)
    machine = Machine(refuses=True)
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent, command(agent) as running:
            await send(running, NOISE[: MUCH + 1])
            await send(running, NOISE[:1])
            await until(lambda: bool(machine.slots) and machine.has_slot)
            await send(running, NOISE[:MUCH])
            await until(lambda: len(machine.stdin[1]) == 2 * MUCH + 2)
            assert machine.asked == [OPEN + b"slot7", CLOSE]
            assert not machine.slots[0].is_lost


async def test_pieces_of_a_call_that_was_left_are_free_when_they_were_read() -> None:
    machine = Machine(reads=lambda stream: stream == 1)
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent, command(agent) as first:
            await opened(agent, first)
            pieces = way(agent)._pieces
            assert pieces is not None
            for number in range(PIECES + 2):
                async with command(agent, 2 + number) as left:
                    left._stdin_sent = left._stdin_taken = MUCH
                    while left.stdin_room:
                        assert await left.send_some(memoryview(NOISE))
                    assert left._staged
                await until(lambda: len(pieces.free) == PIECES)
            assert [asked for asked in machine.asked if asked[:1] == SYNC] == [
                SYNC + (3 + 2 * number).to_bytes(4) for number in range(PIECES + 2)
            ]


@pytest.mark.usefixtures("bounded_memory")
async def test_an_agent_that_says_nothing_keeps_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "DEADLINE", 0.01)
    machine = Machine(silent=True)
    with anyio.fail_after(GUARD):
        async with facing(machine.agent, lend=machine.lend) as agent, command(agent) as running:
            await send(running, NOISE[: MUCH + 1])
            await send(running, NOISE[:MUCH])
            await until(lambda: bool(machine.slots) and machine.has_slot)
            await send(running, NOISE[:MUCH])
            await until(lambda: len(machine.stdin[1]) == 3 * MUCH + 1)
            assert machine.slots[0].is_lost
            assert len(machine.slots) == 1
            assert not machine.pieces


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ([bulk_frame(0, b"o", bulk.STAGING_DONE)] * 2, "nobody asked for"),
        ([bulk_frame(0, b"c", bulk.STAGING_DONE)], "when it was asked"),
        ([bulk_frame(0, b"oo", bulk.STAGING_DONE)], "nobody asked for"),
        ([bulk_frame(1, b"o", bulk.STAGING_DONE)], "nobody asked for"),
    ],
)
async def test_lies(answers: list[bytes], complaint: str) -> None:
    async def liar(peer: Peer) -> None:
        await peer.greet()
        await peer.answer(await peer.request(), STARTED, trailers=None)
        while True:
            frame = await peer.read_frame()
            if isinstance(frame, ExtensionFrame) and frame.flag_byte == bulk.STAGED:
                await peer.send(*answers)
            elif isinstance(frame, ExtensionFrame):
                await peer.send(says(1, RunResponse(stdin_window=len(frame.body))))

    machine = Machine()
    failure: AgentError | None = None
    with anyio.fail_after(GUARD):
        async with facing(liar, lend=machine.lend) as agent, command(agent) as running:
            try:
                while True:
                    await send(running, NOISE[:MUCH])
            except AgentError as error:
                failure = error
    assert isinstance(failure, AgentProtocolError)
    assert complaint in str(failure)


async def test_cancelled_anywhere() -> None:
    machine = Machine()

    async def work() -> None:
        machine.stdin.clear()
        async with facing(machine.agent, lend=machine.lend) as agent, command(agent) as running:
            await send(running, NOISE[: 2 * MUCH])
            await agent.rest()

    async def nothing_is_left(n: int, way: Way) -> None:
        assert machine.has_slot, f"cancelled at suspension {n} ({way})"
        assert len(os.listdir("/proc/self/fd")) == before

    await work()
    before = len(os.listdir("/proc/self/fd"))
    with anyio.fail_after(GUARD):
        assert await cancel_everywhere(work, nothing_is_left, step=3) > 8
