"""What attempts to get out past a policy have in common. The guest of a :class:`~tests.netlab.Lab` makes them."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.netlab import GOOD, Lab, client_hello

POLICY = ["good.example", "alias.example:443", "*.wild.example", "rebound.example", "loop.example", "meta.example",
          "mixed.example", "good.example:8080", "odd.example", "moment.example"]
GET = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n"


async def reached_nothing(world: Lab) -> None:
    """Nothing came to anybody, and what is allowed works still: what was sent before that has been decided."""
    before = b"".join(world.world.received.get((GOOD, 443), []))
    await allowed(world)
    assert set(world.world.received) == {(GOOD, 443)}
    came = b"".join(world.world.received[GOOD, 443])
    assert (came[: len(before)], len(came) - len(before)) == (before, len(client_hello()))
    assert b"evil" not in came


async def allowed(world: Lab) -> None:
    assert await world.addresses("good.example") == [GOOD]
    assert await world.talk(GOOD, 443, client_hello()) == b"reply"


@contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """The guest is told at once."""
    with pytest.raises(OSError, check=lambda exc: exc.errno in (numbers or (errno.ECONNREFUSED,))):
        yield


async def cut(world: Lab, port: int, *pieces: bytes, reason: str, address: str = GOOD) -> None:
    """Connect where it is allowed, and be cut off for what is sent: the server has never got the last piece."""
    await world.addresses("good.example")
    with await world.connect(address, port) as found:
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        for piece in pieces[:-1]:
            await loop.sock_sendall(found, piece)
            assert await world.receive(found) == b"reply"
        await loop.sock_sendall(found, pieces[-1])
        with pytest.raises(ConnectionResetError):
            await world.receive(found)
    assert (await world.event(action="denied", address=address, port=port, reason=reason)).reason == reason
    assert pieces[-1] not in b"".join(world.world.received.get((address, port), []))
