"""Where frames go that a policy lets through: to who has the address, or to a gateway, and to nobody else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import anyio
import pytest
from attrs import frozen

from pykata.net import netns
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, socket_in
from tests import frames
from tests.frames import ACK, PSH, SYN, TCP, UDP, ethernet, ip4, ip6
from tests.lies import ARP, IPV4, IPV6
from tests.netlab import ETH_P_ALL, GATEWAY_MAC, GOOD, GOOD6, GUEST, GUEST6, MAC, Lab, lab

BESIDE, BESIDE6, BESIDE_MAC = "10.81.7.4", "fd81:7::4", "02:00:00:00:00:04"
POLICY = [f"udp:{GOOD}:9000", f"udp:[{GOOD6}]:9000", f"{GOOD}:9000", f"udp:{BESIDE}:9000", f"udp:[{BESIDE6}]:9000"]


@frozen
class Beside:
    """A neighbour on the guest's bridge."""

    netns: Netns
    wire: socket.socket

    def heard(self) -> list[bytes]:
        """The packets for its MAC that have come; its kernel asks by ARP, too, whether the guest is still there."""
        found = []
        with suppress(BlockingIOError):
            while True:
                found.append(self.wire.recv(65536))
        return [each for each in found if each[:6] == frames.mac(BESIDE_MAC) and each[12:14] != ARP.to_bytes(2)]


@asynccontextmanager
async def beside(world: Lab) -> AsyncIterator[Beside]:
    """It answers datagrams to port 9000."""
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(netns.made())
        async with netlink(world.sandbox) as kernel, netlink(made) as there:
            await kernel.add("beside", "veth", peer={"ifname": "eth0", "net_ns_fd": made.fd})
            index = (await kernel.link("beside")).index
            await kernel.change(index, master=(await kernel.link("switch")).index)
            await kernel.up(index)
            near = (await there.link("eth0")).index
            await there.change(near, address=BESIDE_MAC)
            for address in (f"{BESIDE}/24", f"{BESIDE6}/64"):
                await there.add_address(near, address)
            await there.up(near)
        wire = stack.enter_context(socket_in(made, socket.AF_PACKET, socket.SOCK_RAW))
        wire.setblocking(False)
        wire.bind(("eth0", ETH_P_ALL))
        server = stack.enter_context(socket_in(made, socket.AF_INET6, socket.SOCK_DGRAM))
        server.setblocking(False)
        server.bind(("::", 9000))
        loop = asyncio.get_running_loop()
        loop.add_reader(server, lambda: server.sendto(b"beside", server.recvfrom(100)[1]))
        stack.callback(loop.remove_reader, server)
        yield Beside(made, wire)


@pytest.fixture
async def world() -> AsyncIterator[Lab]:
    async with lab(POLICY, bridge=True) as found:
        yield found


def datagram(destination: str, mac: str, *, port: int = 9000) -> bytes:
    """A frame of the guest with a datagram, for whoever has the MAC."""
    source, kind, packet = (GUEST, IPV4, ip4) if "." in destination else (GUEST6, IPV6, ip6)
    body = packet(source, destination, UDP, frames.udp(source, destination, 5000, port, b"hello"))
    return ethernet(kind, body, source=MAC, destination=mac)


def segment(flags: int) -> bytes:
    body = ip4(GUEST, GOOD, TCP, frames.tcp(GUEST, GOOD, 5001, 9000, flags=flags, seq=1, ack=1))
    return ethernet(IPV4, body, source=MAC, destination=BESIDE_MAC)


async def test_a_packet_that_is_allowed_does_not_reach_a_neighbour(world: Lab) -> None:
    """Neither the first one of a flow, which Python looks at, nor the next ones, which the kernel passes on."""
    async with beside(world) as other:
        assert await world.datagram(BESIDE, 9000, b"?") == b"beside"       # its MAC is known by now
        other.heard()
        for to in (GOOD, GOOD6):
            world.send_frame(datagram(to, BESIDE_MAC))
            assert (await world.event(reason="misdirected", address=to)).protocol == "udp"
            world.send_frame(datagram(to, GATEWAY_MAC))
            assert (await world.event(action="allowed", address=to)).port == 9000
            world.send_frame(datagram(to, BESIDE_MAC))
        for flags in (SYN, ACK, PSH | ACK):
            world.send_frame(segment(flags))
        assert await world.talk(GOOD, 9000, b"x") == b"reply"              # all of it has been decided
        assert other.heard() == []


async def test_a_neighbour_that_is_allowed_is_reached(world: Lab) -> None:
    async with beside(world) as other:
        for to in (BESIDE, BESIDE6):
            assert await world.datagram(to, 9000, b"?") == b"beside"
        other.heard()
        for to in (BESIDE, BESIDE6):
            world.send_frame(datagram(to, BESIDE_MAC))
            world.send_frame(datagram(to, BESIDE_MAC, port=9001))
            assert (await world.event(action="denied", address=to)).port == 9001
        came: list[bytes] = []
        async with asyncio.timeout(120):
            while len(came) < 2:
                await anyio.wait_readable(other.wire)
                came += [each for each in other.heard() if each.endswith(b"hello")]
        assert came == [datagram(BESIDE, BESIDE_MAC), datagram(BESIDE6, BESIDE_MAC)]


async def test_a_neighbour_may_connect_and_gets_answers(world: Lab) -> None:
    async with beside(world) as other:
        loop = asyncio.get_running_loop()
        with socket_in(world.guest, socket.AF_INET, socket.SOCK_STREAM) as server:
            server.setblocking(False)
            server.bind((GUEST, 9000))
            server.listen()
            with socket_in(other.netns, socket.AF_INET, socket.SOCK_STREAM) as client:
                client.setblocking(False)
                async with asyncio.timeout(120):
                    await loop.sock_connect(client, (GUEST, 9000))
                    taken, _ = await loop.sock_accept(server)
                    with taken:
                        await loop.sock_sendall(taken, b"from the guest")
                        assert await loop.sock_recv(client, 100) == b"from the guest"


async def test_the_gateways_mac_is_learned() -> None:
    async with lab(POLICY, bridge=True, known=False) as world:
        world.send_frame(datagram(GOOD, GATEWAY_MAC))           # nobody has said so
        assert (await world.event(reason="misdirected")).address == GOOD
        assert await world.datagram(GOOD, 9000, b"?") == b"reply"
        assert await world.talk(GOOD, 9000, b"?") == b"reply"
