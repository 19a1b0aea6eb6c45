"""An agent that breaks HTTP/2: each way is one typed error, at once, and nothing of it is logged."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator

import anyio
import pytest
from hyperframe.frame import (
    AltSvcFrame,
    DataFrame,
    ExtensionFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from pykata.agent.v1 import StatsResponse
from pykata.errors import AgentLostError, AgentProtocolError
from tests.agent.peer import Peer, continuation, data, facing

GUARD = 300.0    # seconds; only a hang takes that long


def raw(kind: int, payload: bytes, stream: int = 0, flags: int = 0, length: int | None = None) -> bytes:
    """A frame that no library would make."""
    size = len(payload) if length is None else length
    return size.to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def setting(number: int, value: int) -> bytes:
    return raw(4, number.to_bytes(2) + value.to_bytes(4))


FIRST = {
    "a kernel's log": b"[    0.000000] Linux version 6.12.0 (root@builder)\r\n" * 10,
    "HTTP/1.1": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "PING first": PingFrame(0, b"12345678").serialize(),
    "SETTINGS ACK first": SettingsFrame(0, flags=["ACK"]).serialize(),
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
}

AFTER_THE_GREETING: dict[str, Frame | bytes] = {
    "16 MiB announced": raw(0, b"", 1, length=2**24 - 1),
    "more than the frame size announced": raw(0, b"", 1, length=128 * 1024 + 1),
    "huge SETTINGS": raw(4, b"", length=60000),
    "huge HEADERS": raw(1, b"", 1, length=100_000),
    "huge PING": raw(6, bytes(9)),
    "short PING": raw(6, bytes(7)),
    "ragged SETTINGS": raw(4, bytes(5)),
    "SETTINGS in a stream": raw(4, bytes(6), 1),
    "SETTINGS ACK with a payload": raw(4, bytes(6), flags=1),
    "PUSH_PROMISE": PushPromiseFrame(1, 2, b"\x88", flags=["END_HEADERS"]),
    "ALTSVC": AltSvcFrame(0, b"\x1b[31mevil", b"h2=evil"),
    "extension": ExtensionFrame(0xBE, 0, body=b"x"),
    "PRIORITY": PriorityFrame(1, 0, 15),
    "stream of the server's": HeadersFrame(2, b"\x88", flags=["END_HEADERS"]),
    "HEADERS in a stream that isn't there": HeadersFrame(99, b"\x88", flags=["END_HEADERS"]),
    "HEADERS in stream 0": raw(1, b"\x88", 0, flags=4),
    "DATA in a stream that isn't there": DataFrame(99, b"x"),
    "DATA in stream 0": raw(0, b"x"),
    "DATA before HEADERS": data(1, b"x"),
    "padded DATA": DataFrame(1, b"", pad_length=200, flags=["PADDED"]),
    "padded HEADERS": HeadersFrame(1, b"\x88", pad_length=200, flags=["PADDED", "END_HEADERS"]),
    "window opened by 0": raw(8, bytes(4)),
    "window opened by 0 in a stream": raw(8, bytes(4), 1),
    "short WINDOW_UPDATE": raw(8, bytes(3)),
    "short RST_STREAM": raw(3, bytes(3), 1),
    "RST_STREAM in stream 0": raw(3, bytes(4)),
    "short GOAWAY": raw(7, bytes(7)),
    "connection window too far": WindowUpdateFrame(0, window_increment=2**31 - 1),
    "stream window too far": WindowUpdateFrame(1, window_increment=2**31 - 1),
    "naked CONTINUATION": continuation(1, b"\x88", end=True),
    "header block that isn't HPACK": HeadersFrame(1, b"\xff" * 50, flags=["END_HEADERS"]),
    "initial window too large": setting(4, 2**31),
    "frame size too small": setting(5, 1),
    "push enabled by 7": setting(2, 7),
    "informational response": HeadersFrame(1, b"\x08\x03103", flags=["END_HEADERS"]),
    "response without a status": HeadersFrame(1, b"\x00\x01a\x01b", flags=["END_HEADERS"]),
    "upper-case header": HeadersFrame(1, b"\x88\x00\x01A\x01b", flags=["END_HEADERS"]),
    "DATA between HEADERS and CONTINUATION": HeadersFrame(1, b"\x88").serialize() + data(1, b"x").serialize(),
}


async def expect(script: Callable[[Peer], Awaitable[None]], error: type[Exception] = AgentProtocolError) -> str:
    """What a call raises that meets this agent."""
    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            with pytest.raises(error) as raised:
                await agent.stats(timeout=GUARD)
            with pytest.raises(error):          # and it stays that way
                await agent.stats(timeout=GUARD)
    text = str(raised.value)
    assert text.isprintable()
    assert len(text) < 500
    return text


@pytest.fixture(autouse=True)
def nothing_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO] == []


@pytest.mark.parametrize("what", FIRST)
async def test_first_bytes(what: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(FIRST[what])
        await peer.drain()

    await expect(script)


@pytest.mark.parametrize("what", AFTER_THE_GREETING)
async def test_frame(what: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        assert await peer.request() == 1
        await peer.send(AFTER_THE_GREETING[what])
        await peer.drain()

    await expect(script)


async def test_header_bomb() -> None:
    # One entry of 4000 bytes in the dynamic table, then references to it: 40 MB of headers from 14 KB.
    block = b"\x40\x01a" + b"\x7f\xa1\x1e" + b"x" * 4000 + b"\xbe" * 10000

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.send(HeadersFrame(await peer.request(), block, flags=["END_HEADERS"]))
        await peer.drain()

    await expect(script)


async def test_endless_headers() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.send(HeadersFrame(stream, b"\x88"))
        while True:
            await peer.send(continuation(stream, b"\x00\x01a\x01b" * 100))

    assert "headers" in await expect(script)


async def test_endless_empty_headers() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.send(HeadersFrame(stream, b""))
        while True:
            await peer.send(continuation(stream, b""))

    await expect(script)


async def test_second_headers() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.send(peer.headers(stream), peer.headers(stream))
        await peer.drain()

    await expect(script)


async def test_frames_after_the_end() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        stream = await peer.request()
        await peer.answer(stream, bytes(StatsResponse()))
        await peer.request()
        await peer.send(data(stream, b"more"))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent:
            await agent.stats()
            with pytest.raises(AgentProtocolError, match="isn't open"):
                await agent.stats()


@pytest.mark.parametrize("code", [0, 2, 11, 0xDEAD])
async def test_goaway(code: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.request()
        await peer.send(GoAwayFrame(0, 1, code, additional_data=b"\x1b[2J"))
        await peer.drain()

    await expect(script, AgentLostError)


@pytest.mark.parametrize("sent", [b"", b"\x00\x00", raw(4, b"", length=6), SettingsFrame(0).serialize()])
async def test_hangs_up(sent: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(sent)

    await expect(script, AgentLostError)


async def test_every_call_learns_of_the_end() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        for _ in range(20):
            await peer.request()

    errors: list[Exception] = []

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, anyio.create_task_group() as group:

            async def call() -> None:
                with pytest.raises(AgentLostError) as raised:
                    await agent.stats()
                errors.append(raised.value)

            for _ in range(20):
                group.start_soon(call)
    assert len({id(error) for error in errors}) == 20      # each its own, with its own traceback


async def test_one_bad_frame_ends_every_call() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.request()
        await peer.request()
        await peer.send(raw(3, bytes(4)))
        await peer.drain()

    with anyio.fail_after(GUARD):
        async with facing(script) as agent, anyio.create_task_group() as group:

            async def call() -> None:
                with pytest.raises(AgentProtocolError):
                    await agent.stats()

            group.start_soon(call)
            group.start_soon(call)
