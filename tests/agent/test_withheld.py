"""What is said to an agent while its machine is saved: nothing, for it could be half a frame in the saved one."""

from __future__ import annotations

import socket

import anyio
import pytest

from pykata.agent.channel import WRITE_LIMIT, Channel
from pykata.errors import AgentError


async def test_it_is_said_afterwards_in_order() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        channel = await Channel.over(ours)
        try:
            theirs.recv(65536)                  # the opening of the connection
            channel.withhold()
            channel.withhold()
            channel.write(b"one, ")
            channel.write(b"two")
            channel.resume_writing()            # it has read what was written before: that changes nothing
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
            with anyio.move_on_after(0) as waiting:
                await channel.writable()
            assert waiting.cancelled_caught
            channel.release()
            assert theirs.recv(100) == b"one, two"
            await channel.writable()
        finally:
            await channel.aclose()


async def test_an_agent_that_has_much_answered_meanwhile_is_left() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel = await Channel.over(ours)
        try:
            channel.withhold()
            channel.write(bytes(WRITE_LIMIT))
            channel.h2.ping(b"12345678")
            channel.flush()
            with pytest.raises(AgentError):
                channel.check()
            channel.release()
        finally:
            await channel.aclose()
