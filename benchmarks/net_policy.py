"""What a policy costs: the throughput of a connection that it allows, by that of the same network without a policy.

    benchmarks/net_policy.py [-n ROUNDS] [--json]

Two guests of one kind, each in the place of an interface of a namespace of its own (TCFilter), send to and receive from
a program outside, by turns. The floor is the one without a policy. What a policy does with an allowed connection is
done by the kernel, so the ratio should be near 1. The time for a connection has what deciding about it takes.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from attrs import define

from benchmarks._table import Row, interleaved, main, row
from pykata import Container, Network, Sandbox, TCFilter
from pykata.net import netns
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, socket_in

BUSYBOX = "builtin:busybox"
OUTSIDE, GUEST, PORT = "10.9.0.1", "10.9.0.2", 5000
AMOUNT = 16             # MiB in each measurement
CONNECTIONS = 20


@define
class Guest:
    """A guest and what is outside it."""

    outside: Netns
    box: Container

    async def sends(self) -> float:
        """Mbit/s from the guest."""
        with self._listening() as server:
            command = f"dd if=/dev/zero bs=64k count={AMOUNT * 16} 2>/dev/null | nc {OUTSIDE} {PORT}"
            async with self.box.process(["sh", "-c", command]) as client:
                taken = await _taken(server)
                await client.wait()
        return taken

    async def receives(self) -> float:
        """Mbit/s to the guest."""
        loop = asyncio.get_running_loop()
        with self._listening() as server:
            async with self.box.process(["sh", "-c", f"nc {OUTSIDE} {PORT} </dev/null >/dev/null"]) as client:
                connection, _ = await loop.sock_accept(server)
                with connection:
                    piece, begun = bytes(1 << 20), time.perf_counter()
                    for _ in range(AMOUNT):
                        await loop.sock_sendall(connection, piece)
                    connection.shutdown(socket.SHUT_WR)
                    await client.wait()
                    return AMOUNT * (1 << 20) * 8 / 1e6 / (time.perf_counter() - begun)

    async def connects(self) -> float:
        """Milliseconds for a connection, with the process that makes it."""
        loop = asyncio.get_running_loop()
        with self._listening() as server:
            command = f"for i in $(seq {CONNECTIONS}); do nc {OUTSIDE} {PORT} </dev/null; done"
            async with self.box.process(["sh", "-c", command]) as client:
                begun = 0.0
                for _ in range(CONNECTIONS):
                    connection, _ = await loop.sock_accept(server)
                    begun = begun or time.perf_counter()
                    connection.close()
                await client.wait()
        return (time.perf_counter() - begun) * 1000 / CONNECTIONS

    def _listening(self) -> socket.socket:
        server = socket_in(self.outside, socket.AF_INET, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setblocking(False)
        server.bind((OUTSIDE, PORT))
        server.listen()
        return server


async def _taken(server: socket.socket) -> float:
    loop = asyncio.get_running_loop()
    connection, _ = await loop.sock_accept(server)
    total, begun, into = 0, time.perf_counter(), bytearray(1 << 20)
    with connection:
        while total < AMOUNT * (1 << 20) and (count := await loop.sock_recv_into(connection, into)):
            total += count
    return total * 8 / 1e6 / (time.perf_counter() - begun)


@asynccontextmanager
async def guest(*, policy: bool) -> AsyncIterator[Guest]:
    """A guest in the place of one end of a veth."""
    async with netns.made() as inside, netns.made() as outside:
        async with netlink(inside) as kernel:
            await kernel.add("eth0", "veth", peer={"ifname": "outside", "net_ns_fd": outside.fd})
        for where, name, address in ((inside, "eth0", GUEST), (outside, "outside", OUTSIDE)):
            async with netlink(where) as kernel:
                link = await kernel.link(name)
                await kernel.add_address(link.index, f"{address}/24")
                await kernel.up(link.index)
        allow = [f"{OUTSIDE}:{PORT}"] if policy else None
        async with (
            Sandbox(network=Network(TCFilter(inside.proc_path), allow=allow), isolation="emulated") as sb,
            sb.container(BUSYBOX) as box,
        ):
            yield Guest(outside, box)


async def measure(rounds: int) -> list[Row]:
    """All figures."""
    rows = []
    async with guest(policy=True) as guarded, guest(policy=False) as free:
        for name, unit, one, floor in (
            ("from the guest", "Mbit/s", guarded.sends, free.sends),
            ("to the guest", "Mbit/s", guarded.receives, free.receives),
            ("a connection", "ms", guarded.connects, free.connects),
        ):
            values, least = await interleaved(rounds, one, floor)
            rows.append(row(name, unit, values, least))
    return rows


if __name__ == "__main__":
    main(measure, rounds=9, about=__doc__)
