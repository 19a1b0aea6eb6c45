"""TCFilter with real guests."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from pykata import Container, Sandbox, TCFilter
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, socket_in
from tests.vm.conftest import until
from tests.worlds import ping, run, world

BUSYBOX = "builtin:busybox"
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM


async def sh(box: Container, script: str) -> str:
    return (await box.run(["sh", "-c", script], check=True, timeout=600)).stdout


@pytest.mark.parametrize("mtu", [1500, 9000])
async def test_the_guest_takes_the_interfaces_place(tmp_path: Path, mtu: int) -> None:
    async with world(tmp_path, mtu=mtu) as (inside, outside):
        await run(inside, "ip", "neigh", "add", "10.1.0.9", "lladdr", "02:00:00:00:00:09", "dev", "eth0")
        async with netlink(inside) as kernel:
            mac = (await kernel.link("eth0")).mac
        async with (
            Sandbox(network=TCFilter(inside.path), isolation="emulated") as sb,
            sb.container(BUSYBOX) as box,
        ):
            assert sb.network.addresses == ("10.1.0.2", "fd01::2")
            said = await sh(box, "ip addr show dev eth0; ip route; ip -6 route; ip neigh")
            for line in (f"mtu {mtu}", f"ether {mac}", "inet 10.1.0.2/24", "inet6 fd01::2/64", "via 10.1.0.1",
                         "via fd01::1", "10.1.0.9 dev eth0 lladdr 02:00:00:00:00:09"):
                assert line in said
            for there, back in (("10.1.0.1", "10.1.0.2"), ("fd01::1", "fd01::2")):
                size = mtu - 28 if "." in there else mtu - 48
                assert "1 packets received" in await sh(box, until(f"ping -c 1 -W 10 -s {size} {there}"))
                assert "1 packets received" in await ping(outside, back, size)


async def test_tcp_and_udp_both_ways_over_any_number_of_interfaces(tmp_path: Path) -> None:
    async with (
        world(tmp_path, interfaces=2) as (inside, outside),
        Sandbox(network=TCFilter(inside.path), isolation="emulated") as sb,
        sb.container(BUSYBOX) as box,
    ):
        # httpd goes to the background once it listens.
        await sh(box, "mkdir /www && echo hello from the guest > /www/index.html && httpd -p 80 -h /www")
        for number in (1, 2):
            for network in (f"10.{number}.0.", f"fd0{number}::"):
                assert b"hello from the guest" in await _fetched(outside, f"{network}2")
                assert await _said_to(outside, box, f"{network}1") == b"hello over tcp\n"
                assert "NXDOMAIN" in await _asked(outside, box, f"{network}1")


def _socket(where: Netns, kind: int, address: str) -> socket.socket:
    made = socket_in(where, socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    made.setblocking(False)
    return made


async def _fetched(where: Netns, address: str) -> bytes:
    loop = asyncio.get_running_loop()
    with _socket(where, TCP, address) as client:
        await loop.sock_connect(client, (address, 80))
        await loop.sock_sendall(client, b"GET / HTTP/1.0\r\n\r\n")
        got = b""
        while piece := await loop.sock_recv(client, 4096):
            got += piece
        return got


async def _said_to(where: Netns, box: Container, address: str) -> bytes:
    """What the guest says over TCP to a server outside, which has to answer for it to end."""
    loop = asyncio.get_running_loop()
    with _socket(where, TCP, address) as server:
        server.bind((address, 7))
        server.listen()
        async with box.process(["sh", "-c", f"echo hello over tcp | nc {address} 7"]) as client:
            connection, _ = await loop.sock_accept(server)
            with connection:
                said = await loop.sock_recv(connection, 4096)
                await loop.sock_sendall(connection, said)
            assert await client.stdout.read() == said
    return said


async def _asked(where: Netns, box: Container, address: str) -> str:
    """What the guest makes of a name server's "no" over UDP."""
    loop = asyncio.get_running_loop()
    with _socket(where, UDP, address) as server:
        server.bind((address, 53))
        async with box.process(["sh", "-c", f"nslookup -type=a a.test {address} 2>&1"]) as client:
            question, peer = await loop.sock_recvfrom(server, 4096)
            await loop.sock_sendto(server, question[:2] + b"\x81\x83" + question[4:], peer)     # RFC 1035, 4.1.1
            return (await client.stdout.read()).decode()
