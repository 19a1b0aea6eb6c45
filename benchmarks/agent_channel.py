"""What a call of the agent and a stream of output take on the host, beside bytes on the same kind of socket.

The agent is one in memory, in a process of its own, and in Python as well: no virtual machine is in these figures, but
half of the work in them is the agent's.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time

from benchmarks._table import Row, interleaved, main, row

PIECE = 64 * 1024
PIECES = 1024       # 64 MiB of output
CALLS = 200

SERVER = """
import asyncio, socket, sys
from benchmarks.agent_channel import serve_echo, serve_fake
asyncio.run({"echo": serve_echo, "agent": serve_fake}[sys.argv[1]](socket.socket(fileno=int(sys.argv[2]))))
"""


async def serve_echo(sock: socket.socket) -> None:
    """A byte is answered with a byte, a zero with 64 MiB."""
    reader, writer = await asyncio.open_connection(sock=sock)
    while byte := await reader.read(1):
        for _ in range(1 if byte != b"\0" else PIECES):
            writer.write(byte if byte != b"\0" else bytes(PIECE))
            await writer.drain()


async def serve_fake(sock: socket.socket) -> None:
    """An agent with a program that writes 64 MiB."""
    from pykata.testing import FakeAgent, FakeProcess

    async def write(process: FakeProcess) -> int:
        for _ in range(PIECES):
            await process.write(bytes(PIECE))
        return 0

    await FakeAgent({"write": write}).serve(sock)


async def measure(rounds: int) -> list[Row]:
    """One row for calls, one for output."""
    from pykata.agent.client import Stdout, connect
    from pykata.agent.v1 import CreateContainerRequest, Mount, Process, Rootfs, SetupRequest, Start

    raw, raw_end = socket.socketpair()
    host, agent_end = socket.socketpair()
    servers = [_server("echo", raw_end), _server("agent", agent_end)]
    reader, writer = await asyncio.open_connection(sock=raw)
    start = Start(container_id="c", process=Process(id="p", args=["write"]))

    async with connect(host) as agent:
        await agent.setup(SetupRequest(hostname="guest"))
        await agent.create_container(CreateContainerRequest(id="c", rootfs=Rootfs(lowers=[Mount(tag="t")])))

        async def echo() -> float:
            began = time.perf_counter()
            for _ in range(CALLS):
                writer.write(b"x")
                await reader.readexactly(1)
            return (time.perf_counter() - began) * 1e6 / CALLS

        async def call() -> float:
            began = time.perf_counter()
            for _ in range(CALLS):
                await agent.stats()
            return (time.perf_counter() - began) * 1e6 / CALLS

        async def read() -> float:
            began = time.perf_counter()
            writer.write(b"\0")
            left = PIECES * PIECE
            while left:
                left -= len(await reader.read(PIECE))
            return (time.perf_counter() - began) * 1000

        async def output() -> float:
            began = time.perf_counter()
            async with agent.run(start) as command:
                total = sum([len(event.data) async for event in command if isinstance(event, Stdout)])
                await command.finished()
            assert total == PIECES * PIECE
            return (time.perf_counter() - began) * 1000

        floor_call, calls, floor_output, outputs = await interleaved(rounds, echo, call, read, output)
    writer.close()
    await writer.wait_closed()
    for server in servers:
        server.wait()
    return [
        row("a call of the agent", "us", calls, floor_call),
        row("64 MiB of output", "ms", outputs, floor_output),
    ]


def _server(kind: str, sock: socket.socket) -> subprocess.Popen[bytes]:
    with sock:
        argv = [sys.executable, "-c", SERVER, kind, str(sock.fileno())]
        return subprocess.Popen(argv, pass_fds=[sock.fileno()])


if __name__ == "__main__":
    main(measure, rounds=20, about=__doc__)
