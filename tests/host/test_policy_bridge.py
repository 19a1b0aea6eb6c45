"""A policy in a network of pykata's own: the other sandboxes, the gateway, the host."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import dns.message
import dns.rcode
import pytest

from pykata.net.base import Wanted
from pykata.net.bridge import Bridge
from pykata.net.netns import Netns, socket_in
from pykata.net.policy.guard import RESOLVER
from pykata.net.policy.rules import policy_of
from pykata.spec import Attachment
from tests.host.stand_in import stand_in
from tests.netlab import HOST, neighbourhood


@asynccontextmanager
async def guest(path: Path, wanted: Wanted) -> AsyncIterator[tuple[Netns, Attachment]]:
    await anyio.Path(path).mkdir()
    async with Bridge(network="policed").attach(path, wanted) as attachment, stand_in(attachment) as made:
        yield made, attachment


async def connected(where: Netns, address: str, port: int) -> None:
    with socket_in(where, socket.AF_INET, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        async with asyncio.timeout(120):
            await asyncio.get_running_loop().sock_connect(client, (address, port))


async def lookup(where: Netns, name: str) -> dns.message.Message:
    with socket_in(where, socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        client.connect((RESOLVER, 53))
        client.send(dns.message.make_query(name, "A").to_wire())
        async with asyncio.timeout(120):
            return dns.message.from_wire(await asyncio.get_running_loop().sock_recv(client, 4096))


def listening(where: Netns, port: int) -> socket.socket:
    server = socket_in(where, socket.AF_INET, socket.SOCK_STREAM)
    server.bind(("", port))
    server.listen()
    return server


async def test_another_sandbox_is_found_by_its_name_where_it_is_allowed(tmp_path: Path) -> None:
    wanted = Wanted(policy=policy_of(["db:9000"], (), None), hostname="worker")
    async with (
        guest(tmp_path / "0000000001", wanted) as (worker, attachment),
        guest(tmp_path / "0000000002", Wanted(hostname="db")) as (db, other),
        AsyncExitStack() as stack,
    ):
        assert attachment.nameservers == (RESOLVER,)
        for port in (9000, 9001):
            stack.enter_context(listening(db, port))
        stack.enter_context(listening(worker, 9000))
        address, own = (each.interfaces[0].addresses[0].partition("/")[0] for each in (other, attachment))
        with pytest.raises(ConnectionRefusedError):     # its name wasn't asked for yet
            await connected(worker, address, 9000)
        assert address in str((await lookup(worker, "db")).answer[0])
        await connected(worker, address, 9000)
        for port in (9001, 22):
            with pytest.raises(ConnectionRefusedError):
                await connected(worker, address, port)
        assert (await lookup(worker, "worker")).rcode() == dns.rcode.NXDOMAIN
        await connected(db, own, 9000)                  # nobody said that others mayn't
        said = []
        async with asyncio.timeout(120):
            async for event in attachment.guards[0].events():
                said += [(event.action, event.port)] if event.address == address else []
                if event.port == 22:
                    break
        assert said == [("denied", port) for port in (9000, 9001, 22)]


async def test_neither_the_gateway_nor_the_host_are_reached(tmp_path: Path) -> None:
    wanted = Wanted(policy=policy_of(["0.0.0.0/0"], (), None))
    async with (
        neighbourhood(tmp_path, ("127.83.7.53", 53)), guest(tmp_path / "0000000001", wanted) as (made, attachment),
    ):  # fmt: skip
        with socket_in(made, socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.connect((HOST, 9))
            client.send(b"?")
            with pytest.raises(OSError, check=lambda exc: exc.errno == errno.EHOSTUNREACH):
                async with asyncio.timeout(120):
                    await asyncio.get_running_loop().sock_recv(client, 100)
        async with asyncio.timeout(120):
            async for event in attachment.guards[0].events():
                if event.address == HOST:
                    break
        assert event.reason == "protected"
