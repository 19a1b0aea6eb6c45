"""Commands that are asked for in one frame and answered in one: agent.proto, "Short commands".

A call of gRPC takes as long as a small program, here and in the guest. One that isn't over soon goes on as a call.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pykata.agent import bulk
from pykata.agent.stream import Headers, Stream

if TYPE_CHECKING:
    from pykata.agent.channel import Channel

LONGEST_COMMAND = 32 * 1024
"""Bytes of a request that may come so."""


class Answer:
    """What the agent says of a command, in pieces as they come."""

    def __init__(self) -> None:
        self.flag = 0
        self.data = bytearray()
        self.is_whole = False
        self.over = asyncio.Event()
        """All of it is here, or the connection has ended."""

    def put(self, flag: int, data: bytes, *, whole: bool) -> None:
        """Take in the payload of the frame, or a part of it."""
        self.flag = flag
        self.data += data
        if whole:
            self.is_whole = True
            self.over.set()


async def command(channel: Channel, number: int, request: bytes, headers: Headers, attach: bytes) -> Stream:
    """Send a command; returns what the agent says of it as if it had come by a call.

    If it goes on, it does so as a call with these headers and this first message. A cancellation ends the command.
    """
    await channel.writable()
    answer = channel.expect(number)
    try:
        channel.write(bulk.frame(number, bulk.COMMAND, request))
        await answer.over.wait()
        if not answer.is_whole:
            channel.check()
        if answer.flag == bulk.GOES_ON:
            return await _attached(channel, number, answer, headers, attach)
    except BaseException:
        channel.write(bulk.frame(number, bulk.LEAVE, b"\0"))
        raise
    finally:
        channel.forget(number)
    stream = Stream(channel, number)
    if answer.flag == bulk.OVER:
        stream.complete(bytes(answer.data), 0, b"")
    else:
        stream.complete(b"", answer.data[0], bytes(answer.data[1:]))
    return stream


async def _attached(channel: Channel, number: int, answer: Answer, headers: Headers, attach: bytes) -> Stream:
    stream = await channel.open(headers)
    try:
        stream.data_received(bytes(answer.data), 0)
        channel.alias(number, stream)
        await stream.send(attach)
    except BaseException:
        stream.close()
        raise
    return stream
