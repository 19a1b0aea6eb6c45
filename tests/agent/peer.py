"""The agent's end of a connection, frame by frame, for agents that don't keep to the rules."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
from hpack import Encoder
from hyperframe.frame import ContinuationFrame, DataFrame, Frame, HeadersFrame, RstStreamFrame, SettingsFrame

from pykata.agent.client import AgentClient, connect
from pykata.agent.parking import AHEAD
from pykata.agent.staging import Lend
from pykata.agent.stream import frame as grpc_message

PREFACE = 24
OK_HEADERS = ((b":status", b"200"), (b"content-type", b"application/grpc"))
OK_TRAILERS = ((b"grpc-status", b"0"),)

Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """Reads the host's frames, sends whatever a test wants."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._encoder = Encoder()
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def start(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(sock=self._sock)

    async def greet(self) -> None:
        """The opening of the connection as it should be."""
        await self._reader.readexactly(PREFACE)
        await self.send(SettingsFrame(0))

    async def ahead(self, kind: int) -> bytes:
        """A request that comes before HTTP/2."""
        assert await self._reader.readexactly(len(AHEAD)) == AHEAD
        header = await self._reader.readexactly(4)
        assert header[0] == kind
        return await self._reader.readexactly(int.from_bytes(header[1:]))

    async def read_frame(self) -> Frame:
        header = await self._reader.readexactly(9)
        frame, length = Frame.parse_frame_header(memoryview(header))
        frame.parse_body(memoryview(await self._reader.readexactly(length)))
        return frame

    async def request(self) -> int:
        """Wait until a call is opened; its stream."""
        while True:
            frame = await self.read_frame()
            if isinstance(frame, HeadersFrame):
                return frame.stream_id

    async def send(self, *frames: Frame | bytes) -> None:
        for frame in frames:
            self._writer.write(frame if isinstance(frame, bytes) else frame.serialize())
        await self._writer.drain()

    def headers(
        self, stream: int, headers: Sequence[tuple[bytes, bytes]] = OK_HEADERS, *, end: bool = False
    ) -> HeadersFrame:
        """A header block as a frame. Blocks must be sent in the order in which they were made."""
        flags = ["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"]
        return HeadersFrame(stream, self._encoder.encode(headers), flags=flags)

    async def answer(
        self,
        stream: int,
        *messages: bytes,
        headers: Sequence[tuple[bytes, bytes]] = OK_HEADERS,
        trailers: Sequence[tuple[bytes, bytes]] | None = OK_TRAILERS,
    ) -> None:
        """Headers, messages, and, unless it is None, trailers."""
        await self.send(self.headers(stream, headers))
        for message in messages:
            await self.send(data(stream, grpc_message(message)))
        if trailers is not None:
            await self.send(self.headers(stream, trailers, end=True))

    async def drain(self) -> None:
        """Read and forget, until the host hangs up."""
        while await self._reader.read(65536):
            pass

    def close(self) -> None:
        self._writer.transport.abort()


def data(stream: int, payload: bytes, *, end: bool = False) -> DataFrame:
    return DataFrame(stream, payload, flags=["END_STREAM"] if end else [])


def reset(stream: int, code: int = 0) -> RstStreamFrame:
    return RstStreamFrame(stream, error_code=code)


def continuation(stream: int, payload: bytes, *, end: bool = False) -> ContinuationFrame:
    return ContinuationFrame(stream, payload, flags=["END_HEADERS"] if end else [])


@asynccontextmanager
async def facing(script: Script, *, saved: bool = False, lend: Lend | None = None) -> AsyncIterator[AgentClient]:
    """The host's client, with ``script`` as its agent. The agent's end is closed when the script ends.

    One that was ``saved`` has greeted its host before that.
    """
    greeting = SettingsFrame(0).serialize() if saved else b""
    host, guest = socket.socketpair()
    async with anyio.create_task_group() as group:
        group.start_soon(_play, guest, script)
        async with connect(host, greeting=greeting, parked=saved, lend=lend) as agent:
            yield agent
        group.cancel_scope.cancel()


async def _play(sock: socket.socket, script: Script) -> None:
    peer = Peer(sock)
    await peer.start()
    try:
        await script(peer)
    except* (ConnectionError, asyncio.IncompleteReadError):
        pass    # the host hung up, as it should
    finally:
        peer.close()
        await anyio.lowlevel.cancel_shielded_checkpoint()
