"""Published ports: sockets of the host that lead into a namespace. The guest is a socket in there."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from pykata.errors import NetworkError, PortInUseError
from pykata.net import netns as namespaces
from pykata.net.netns import Netns, socket_in
from pykata.net.ports import parse_ports
from pykata.net.relay import bound, relayed
from pykata.spec import Port

GUEST = "127.0.0.1"


@pytest.fixture
async def guest() -> AsyncIterator[Netns]:
    async with namespaces.made() as made:
        yield made


@asynccontextmanager
async def published(guest: Netns, *ports: object) -> AsyncIterator[tuple[Port, ...]]:
    with bound(parse_ports(ports)) as listeners:  # type: ignore[arg-type]
        async with relayed(listeners, guest, [GUEST]) as found:
            yield found


def listening(guest: Netns, port: int) -> socket.socket:
    sock = socket_in(guest, socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((GUEST, port))
    sock.listen(256)
    return sock


async def dialled(port: Port) -> socket.socket:
    family = socket.AF_INET6 if ":" in port.address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (port.address, port.host))
    except OSError:
        sock.close()
        raise
    return sock


async def everything(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    found = bytearray()
    while data := await loop.sock_recv(sock, 65536):
        found += data
    return bytes(found)


async def test_each_direction_ends_by_itself(guest: Netns) -> None:
    loop = asyncio.get_running_loop()
    with listening(guest, 80) as listener:
        async with published(guest, 80) as (port,):
            assert port.host != 0
            with await dialled(port) as client:
                server, _ = await loop.sock_accept(listener)
                with server:
                    await loop.sock_sendall(client, b"question")
                    client.shutdown(socket.SHUT_WR)
                    assert await everything(server) == b"question"
                    await loop.sock_sendall(server, b"answer")      # after the other direction's end
                    server.shutdown(socket.SHUT_WR)
                    assert await everything(client) == b"answer"


async def test_megabytes_come_whole_and_a_slow_reader_stops_the_writer(guest: Netns) -> None:
    loop = asyncio.get_running_loop()
    data = os.urandom(1 << 20) * 32
    sent = 0
    with listening(guest, 80) as listener:
        async with published(guest, 80) as (port,), anyio.create_task_group() as group:
            with await dialled(port) as client:
                server, _ = await loop.sock_accept(listener)

                async def write() -> None:
                    nonlocal sent
                    with server:
                        for start in range(0, len(data), 1 << 16):
                            await loop.sock_sendall(server, data[start : start + (1 << 16)])
                            sent = start

                group.start_soon(write)
                before = -1
                while sent != before:       # until nothing moves any more: what is on its way is bounded
                    before = sent
                    for _ in range(200):
                        await anyio.lowlevel.checkpoint()
                assert sent < len(data) - (1 << 16)
                assert await everything(client) == data


async def test_many_connections_at_once(guest: Netns) -> None:
    loop = asyncio.get_running_loop()

    async def serve(server: socket.socket) -> None:
        with server:
            await loop.sock_sendall(server, await loop.sock_recv(server, 100))

    async def ask(port: Port, number: int) -> None:
        with await dialled(port) as client:
            await loop.sock_sendall(client, str(number).encode())
            assert await everything(client) == str(number).encode()

    with listening(guest, 80) as listener:
        async with published(guest, 80) as (port,), anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(ask, port, number)
            for _ in range(200):
                server, _ = await loop.sock_accept(listener)
                group.start_soon(serve, server)


async def test_where_nobody_listens_the_client_is_reset(guest: Netns) -> None:
    async with published(guest, 81) as (port,):
        with await dialled(port) as client, pytest.raises(ConnectionResetError):
            await everything(client)


async def test_what_is_open_ends_with_the_sandbox(guest: Netns) -> None:
    loop = asyncio.get_running_loop()
    with listening(guest, 80) as listener:
        async with published(guest, 80) as (port,):
            client = await dialled(port)
            server, _ = await loop.sock_accept(listener)
        with client, server:
            assert await everything(client) == b""
            assert await everything(server) == b""
        with pytest.raises(ConnectionRefusedError):
            await dialled(port)


async def test_datagrams_find_back_to_who_sent_them(guest: Netns) -> None:
    loop = asyncio.get_running_loop()
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with socket_in(guest, socket.AF_INET, kind) as server:
        server.bind((GUEST, 53))
        async with published(guest, "53/udp") as (port,):
            with socket.socket(socket.AF_INET, kind) as one, socket.socket(socket.AF_INET, kind) as two:
                for client, text in ((one, b"1"), (two, b"2"), (one, b"3"), (two, bytes(60000))):
                    client.connect((port.address, port.host))
                    client.send(text)
                    data, address = await loop.sock_recvfrom(server, 65536)
                    server.sendto(data + b"!", address)
                    assert await loop.sock_recv(client, 65536) == text + b"!"


async def test_a_datagram_that_nobody_takes_is_lost_and_the_next_one_is_not(guest: Netns) -> None:
    loop = asyncio.get_running_loop()
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    async with published(guest, "53/udp") as (port,):
        with socket.socket(socket.AF_INET, kind) as client, socket_in(guest, socket.AF_INET, kind) as server:
            client.connect((port.address, port.host))
            client.send(b"lost")
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            server.bind((GUEST, 53))
            found = b""
            while found != b"found":
                client.send(b"found")
                found = await loop.sock_recv(server, 100)


async def test_ipv6_and_any_address_of_the_host(guest: Netns) -> None:
    loop = asyncio.get_running_loop()
    with listening(guest, 80) as listener:
        async with published(guest, "[::1]:0:80", "0.0.0.0:0:80") as (six, any_address):
            assert (six.address, any_address.address) == ("::1", "0.0.0.0")  # noqa: S104
            for port in (six, any_address):
                with await dialled(port) as client:
                    server, _ = await loop.sock_accept(listener)
                    server.close()
                    assert await everything(client) == b""


def test_a_port_in_use_is_named() -> None:
    with bound(parse_ports([80])) as (taken,):
        number = taken.port.host
        with pytest.raises(PortInUseError, match=f"127.0.0.1:{number}/tcp is in use"), bound(parse_ports({number: 80})):
            pass
        # The same number is another port for UDP.
        with bound(parse_ports([f"{number}:80/udp"])) as (other,):
            assert other.port.host == number


def test_an_address_that_is_not_ours() -> None:
    ports = parse_ports(["203.0.113.1:0:80"])
    with pytest.raises(NetworkError, match=r"203\.0\.113\.1:0/tcp can't be published"), bound(ports):
        pass
