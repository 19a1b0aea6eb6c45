"""Bulk frames whose data goes to a pipe past Python: in order, whoever is slow, and whatever comes between."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import IO, cast

import anyio
import pytest
from h2.exceptions import ProtocolError

from pykata.agent import bulk
from pykata.agent.client import Exited, RunStream
from pykata.agent.large import AT_ONCE, LARGE, LargeFrames
from pykata.agent.run import Stderr, Stdout
from pykata.agent.v1 import Ended as EndedMessage
from pykata.agent.v1 import RunResponse
from pykata.errors import AgentError, AgentProtocolError
from pykata.host import PipeWriter
from tests.agent.peer import OK_TRAILERS, Peer, facing
from tests.agent.test_bulk import BEGINS, EXITED, GUARD, STARTED, bulk_frame, says, start

pytestmark = pytest.mark.usefixtures("bounded_memory")

BOTH = RunResponse(bulk=EndedMessage(stdout=True, stderr=True))


class Reading:
    """A thread that reads a pipe to its end."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._pipe = os.fdopen(descriptor, "rb", buffering=0)
        self._size = size
        self._thread = Thread(target=self._read)
        self.data = bytearray()

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _read(self) -> None:
        with self._pipe:
            while piece := self._pipe.read(self._size):
                self.data += piece


@contextmanager
def pipe(size: int = 64 * 1024) -> Iterator[tuple[PipeWriter, Reading]]:
    reader, writer = os.pipe()
    into = PipeWriter(cast(IO[bytes], os.fdopen(writer, "wb", buffering=0)))
    reading = Reading(reader, size)
    try:
        yield into, reading
    finally:
        into.close()
        if reading._thread.ident is None:
            reading._pipe.close()
        else:
            reading.join()


async def passed(command: RunStream, into: PipeWriter) -> tuple[int, bytes]:
    """Passes on stdout; how much of it came as events, and all of stderr."""
    size, stderr = 0, bytearray()
    with command.diverted(into._pipe.fileno()):
        async for event in command:
            match event:
                case Stdout(data):
                    size += len(data)
                    command.took("stdout", len(data))
                    await into.send(data)
                case Stderr(data):
                    stderr += data
                    command.took("stderr", len(data))
                case Exited():
                    break
    return size, bytes(stderr)


async def test_what_comes_goes_to_the_pipe() -> None:
    """None of it as an event, once whoever reads them waits for it; and it counts as taken."""
    data = random.Random(1).randbytes(12 * bulk.LONGEST + 5)

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(STARTED), bytes(RunResponse(stdout=b"first ")), bytes(BEGINS), trailers=None)
        await awaited.wait()
        async with anyio.create_task_group() as group:
            group.start_soon(peer.drain)
            for at in range(0, len(data), bulk.LONGEST):
                await peer.send(bulk_frame(stream, data[at : at + bulk.LONGEST]))
            await peer.send(says(stream, EXITED), peer.headers(stream, OK_TRAILERS, end=True))

    awaited = anyio.Event()
    with anyio.fail_after(GUARD), pipe() as (into, reading):
        reading.start()
        async with facing(script) as agent, agent.run(start()) as command, anyio.create_task_group() as group:
            first = await anext(command)
            assert isinstance(first, Stdout)
            await into.send(first.data)
            group.start_soon(_when_all_taken, command, awaited)
            size, _ = await passed(command, into)
        into.close()
        reading.join()
    assert reading.data == b"first " + data
    assert size < len(data)


async def _when_all_taken(command: RunStream, awaited: anyio.Event) -> None:
    while not command._bulk._all_taken:
        await anyio.lowlevel.checkpoint()
    awaited.set()


@pytest.mark.parametrize("seed", range(8))
async def test_nothing_is_lost_or_overtaken(seed: int) -> None:
    """Frames of all sizes, of both streams, in writes of any size, and a reader that is slow at first."""
    chance = random.Random(seed)
    sizes = (1, 100, LARGE - 1, LARGE, LARGE + 1, 100_000, bulk.LONGEST)
    frames = [
        (chance.choice((0, 0, 0, 1)), chance.randbytes(chance.choice(sizes) if chance.random() < 0.8 else 3))
        for _ in range(60)
    ]  # fmt: skip

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(STARTED), bytes(BOTH), trailers=None)
        out = b"".join(bulk_frame(stream, payload, flag) for flag, payload in frames)
        async with anyio.create_task_group() as group:
            group.start_soon(peer.drain)
            at = 0
            while at < len(out):
                step = chance.choice((1, 9, 1000, 32 * 1024, 300_000))
                await peer.send(out[at : at + step])
                at += step
            await peer.send(says(stream, EXITED), peer.headers(stream, OK_TRAILERS, end=True))

    with anyio.fail_after(GUARD), pipe(chance.choice((1000, 100_000))) as (into, reading):

        async def late() -> None:
            for _ in range(chance.choice((0, 50))):
                await anyio.lowlevel.checkpoint()
            reading.start()

        async with (
            facing(script) as agent, agent.run(start(16 * AT_ONCE)) as command, anyio.create_task_group() as group
        ):  # fmt: skip
            group.start_soon(late)
            _, stderr = await passed(command, into)
        into.close()
        reading.join()
    assert reading.data == b"".join(payload for flag, payload in frames if flag == 0)
    assert stderr == b"".join(payload for flag, payload in frames if flag == 1)


async def test_who_reads_the_pipe_goes_away() -> None:
    """What comes is an event again, and the call goes on."""

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(STARTED), bytes(BEGINS), trailers=None)
        for _ in range(3):
            await peer.send(bulk_frame(stream, bytes(LARGE)))
        await peer.send(says(stream, EXITED), peer.headers(stream, OK_TRAILERS, end=True))

    size = 0
    with anyio.fail_after(GUARD), pipe() as (into, reading):
        reading._pipe.close()
        async with facing(script) as agent, agent.run(start(4 * LARGE)) as command:
            with command.diverted(into._pipe.fileno()):
                async for event in command:
                    if isinstance(event, Stdout):
                        size += len(event.data)
    assert size == 3 * LARGE


async def test_a_full_pipe_bounds_what_may_come() -> None:
    """An agent that doesn't care for windows is found out as it is without a pipe."""

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(STARTED), bytes(BEGINS), trailers=None)
        with suppress(OSError):
            while True:
                await peer.send(bulk_frame(stream, bytes(bulk.LONGEST)))

    failure = None
    with anyio.fail_after(GUARD), pipe() as (into, _):
        async with facing(script) as agent, agent.run(start()) as command:
            try:
                await passed(command, into)     # whose writes nobody reads
            except AgentProtocolError as error:
                failure = error
    assert "wasn't allowed" in str(failure)


async def test_what_h2_makes_of_it_is_an_error_of_the_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not one that asyncio prints, with the guest's bytes in it."""

    def receive(self: LargeFrames) -> None:
        raise ProtocolError("the window \0 is full")

    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(STARTED), bytes(BEGINS), trailers=None)
        with suppress(OSError):
            await peer.send(bulk_frame(stream, bytes(bulk.LONGEST)))
            await peer.drain()

    monkeypatch.setattr(LargeFrames, "receive", receive)
    printed: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: printed.append(context))
    failure = None
    with anyio.fail_after(GUARD), pipe() as (into, reading):
        reading.start()
        async with facing(script) as agent, agent.run(start(bulk.LONGEST)) as command:
            try:
                await passed(command, into)
            except AgentError as error:
                failure = error
    assert isinstance(failure, AgentProtocolError)
    assert "ProtocolError: the window" in str(failure)
    assert not printed
