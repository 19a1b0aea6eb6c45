"""Pieces of data between a task and a thread."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from threading import Event

import anyio

from pykata.files.handover import LIMIT, OVERHEAD, Handover
from tests.settling import settled

PIECE = 1024 * 1024


@asynccontextmanager
async def taking(handover: Handover, pieces: int, go: Event, got: list[bytes]) -> AsyncIterator[None]:
    """A thread that takes so many pieces once it may; 0: all that there are."""

    def take() -> None:
        try:
            go.wait()
            for piece in handover:
                got.append(piece)
                if len(got) == pieces:
                    return
        finally:
            handover.refuse()

    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, take)
        try:
            yield
        finally:
            handover.end()
            go.set()


async def test_all_arrives_in_order() -> None:
    handover, go, got = Handover(), Event(), list[bytes]()
    go.set()
    sent = [bytes([number % 256]) * (1 + number * 997 % 70_000) for number in range(500)]
    async with taking(handover, 0, go, got):
        for piece in sent:
            assert await handover.put(piece)
    assert got == sent


async def test_who_is_ahead_waits() -> None:
    handover, go, got = Handover(), Event(), list[bytes]()
    ahead = 0
    async with taking(handover, 0, go, got):

        async def put() -> None:
            nonlocal ahead
            for _ in range(20):
                await handover.put(bytes(PIECE))
                ahead += 1

        async with anyio.create_task_group() as group:
            group.start_soon(put)
            await settled()
            assert (ahead, got) == (LIMIT // PIECE, [])
            go.set()
    assert (ahead, len(got)) == (20, 20)


async def test_tiny_pieces_count_for_more_than_their_data() -> None:
    handover, go, got = Handover(), Event(), list[bytes]()
    async with taking(handover, 0, go, got):
        with anyio.move_on_after(0.01):
            while True:
                await handover.put(b"ab")
        assert handover._pieces.qsize() <= LIMIT // OVERHEAD


async def test_who_waits_hears_that_no_more_is_taken() -> None:
    handover, go, got = Handover(), Event(), list[bytes]()
    async with taking(handover, 1, go, got):
        for _ in range(LIMIT // PIECE):
            assert await handover.put(bytes(PIECE))
        go.set()
        while await handover.put(bytes(PIECE)):
            pass
    assert len(got) == 1
