"""The client against a gRPC server that isn't ours."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import betterproto2
import pytest
from grpclib.config import Configuration
from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError
from grpclib.server import Server

from pykata.agent import v1
from pykata.agent.client import AgentClient, Exited, Stdout, connect
from pykata.errors import AgentRefusedError

GUARD = 300.0


class Codec(CodecBase):
    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: type[betterproto2.Message]) -> Any:
        return message_type.parse(data)


class Service:
    async def stats(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(v1.StatsResponse(agent_rss=5))

    async def signal(self, stream: Any) -> None:
        await stream.recv_message()
        raise GRPCError(Status.NOT_FOUND, "process p: ü\n")

    async def run(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(v1.RunResponse(started=v1.Started(pid=2)))
        while (message := await stream.recv_message()) and not message.stdin_closed:
            await stream.send_message(v1.RunResponse(stdout=message.stdin))
        await stream.send_message(v1.RunResponse(exited=v1.Exited(exit_code=4)))

    def __mapping__(self) -> dict[str, Handler]:
        prefix, one, both = "/pykata.agent.v1.Agent/", Cardinality.UNARY_UNARY, Cardinality.STREAM_STREAM
        return {
            prefix + "Stats": Handler(self.stats, one, v1.StatsRequest, v1.StatsResponse),
            prefix + "Signal": Handler(self.signal, one, v1.SignalRequest, v1.SignalResponse),
            prefix + "Run": Handler(self.run, both, v1.RunRequest, v1.RunResponse),
        }


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[AgentClient]:
    server = Server([Service()], codec=Codec(), config=Configuration(http2_connection_window_size=2**31 - 1))
    await server.start(path=str(path))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    try:
        with anyio.fail_after(GUARD):
            async with connect(sock) as agent:
                yield agent
    finally:
        server.close()
        await server.wait_closed()


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pk-") as folder:   # tmp_path is too long for a socket
        yield Path(folder) / "s"


async def test_calls(path: Path) -> None:
    async with served(path) as agent:
        assert (await agent.stats()).agent_rss == 5
        with pytest.raises(AgentRefusedError, match="ü") as raised:
            await agent.signal("c", "p", 9)
        assert raised.value.status == "NOT_FOUND"
        with pytest.raises(AgentRefusedError) as raised:
            await agent.remove_container("c")
        assert raised.value.status == "UNIMPLEMENTED"


async def test_run(path: Path) -> None:
    start = v1.Start(container_id="c", process=v1.Process(id="p", args=["cat"]))
    got = bytearray()
    async with served(path) as agent, agent.run(start) as command, anyio.create_task_group() as group:

        async def feed() -> None:
            for number in range(256):
                await command.send_stdin(bytes((number,)) * 10_000)
            await command.close_stdin()

        assert await command.started() == 2
        group.start_soon(feed)
        async for event in command:
            if isinstance(event, Stdout):
                got += event.data
        assert event == Exited(4)
        await command.finished()
    assert got == b"".join(bytes((number,)) * 10_000 for number in range(256))
