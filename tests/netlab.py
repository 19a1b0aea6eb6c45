"""A small world of network namespaces: a guest, the place where its packets are judged, and everybody else.

``guest`` -- tap | uplink -- ``world``. In the guest's place is a namespace at the other end of a veth, which takes
the tap's place: what the chains see is the same, and the guest can be made to send anything without a boot.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import cast

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
from attrs import define, field

from pykata.net import netns
from pykata.net.base import Wanted
from pykata.net.netlink import Netlink, netlink
from pykata.net.netns import Netns, socket_in
from pykata.net.policy.enforce import Policing, Tapped, enforced
from pykata.net.policy.guard import RESOLVER
from pykata.net.policy.rules import policy_of
from pykata.net.tap import Tap, link_name
from pykata.spec import NetworkEvent

MAC, GATEWAY_MAC = "02:00:00:00:00:02", "02:00:00:00:00:01"
GUEST, GATEWAY, GUEST6, GATEWAY6 = "10.81.7.2", "10.81.7.1", "fd81:7::2", "fd81:7::1"
NEIGHBOUR, HOST = "10.81.7.3", "10.81.7.9"
# Addresses that the internet could have: in these namespaces they are on the loopback interface of the world.
GOOD, OTHER, THIRD, FOURTH, GOOD6 = "20.0.0.1", "20.0.0.2", "20.0.0.3", "20.0.0.4", "2a00:1450::1"
ETH_P_ALL = 3
METADATA = "169.254.169.254"
TCP_PORTS = (22, 53, 80, 443, 8080, 8443, 9000)
UDP_PORTS = (53, 123, 443, 9000)
RUN_DIR = Path("/nowhere/0123456789")


@define(eq=False)
class World:
    """What there is outside, and what came there: by address and port, the bytes of each connection or datagram."""

    netns: Netns
    received: dict[tuple[str, int], list[bytes]] = field(factory=dict)
    reply: bytes = b"reply"

    def took(self, address: str, port: int, data: bytes) -> None:
        self.received.setdefault((address, port), []).append(data)


@define(eq=False)
class Resolver:
    """A name server. ``records`` are texts as in a zone file, by name and type."""

    records: dict[tuple[str, str], list[str]]
    address: tuple[str, int] = ("", 0)
    asked: list[tuple[str, str]] = field(factory=list)
    rewrite: Callable[[dns.message.Message], None] = lambda _: None

    def answer(self, wire: bytes) -> bytes:
        message = dns.message.from_wire(wire)
        name = message.question[0].name.to_text(omit_final_dot=True)
        kind = dns.rdatatype.to_text(message.question[0].rdtype)
        self.asked.append((name, kind))
        response = dns.message.make_response(message)
        if not any(known == name for known, _ in self.records):
            response.set_rcode(dns.rcode.NXDOMAIN)
        self._follow(response, name, kind)
        self.rewrite(response)
        return response.to_wire()

    def _follow(self, response: dns.message.Message, name: str, kind: str) -> None:
        if alias := self.records.get((name, "CNAME")):
            response.answer.append(dns.rrset.from_text(f"{name}.", 60, "IN", "CNAME", *alias))
            self._follow(response, alias[0].removesuffix("."), kind)
        elif found := self.records.get((name, kind)):
            response.answer.append(dns.rrset.from_text(f"{name}.", 60, "IN", kind, *found))


@define(eq=False)
class Lab:
    """All of it, running."""

    guest: Netns
    sandbox: Netns
    world: World
    resolver: Resolver
    guard: Policing

    # --- what a guest does ---

    async def connect(self, address: str, port: int, *, sport: int = 0) -> socket.socket:
        """A TCP connection from the guest. Raises OSError, or TimeoutError when nobody says anything."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        found = socket_in(self.guest, family, socket.SOCK_STREAM)
        try:
            found.setblocking(False)
            if sport:
                # The port is free again as soon as it is closed.
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                found.bind(("", sport))
            async with asyncio.timeout(120):
                await asyncio.get_running_loop().sock_connect(found, (address, port))
        except BaseException:
            found.close()
            raise
        return found

    async def talk(self, address: str, port: int, data: bytes, **options: int) -> bytes:
        """Connect, send, and what comes back first."""
        with await self.connect(address, port, **options) as found:
            await asyncio.get_running_loop().sock_sendall(found, data)
            return await self.receive(found)

    async def receive(self, found: socket.socket) -> bytes:
        async with asyncio.timeout(120):
            return await asyncio.get_running_loop().sock_recv(found, 65536)

    async def datagram(self, address: str, port: int, data: bytes) -> bytes:
        """Send a datagram, and what comes back: raises OSError where that is an ICMP error."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket_in(self.guest, family, socket.SOCK_DGRAM) as found:
            found.setblocking(False)
            found.connect((address, port))
            found.send(data)
            return await self.receive(found)

    async def lookup(
        self, name: str, kind: str = "A", *, server: str = RESOLVER, edns: int = -1
    ) -> dns.message.Message:
        """Ask for a name."""
        query = dns.message.make_query(name, kind, use_edns=edns)
        return dns.message.from_wire(await self.datagram(server, 53, query.to_wire()))

    async def addresses(self, name: str, kind: str = "A") -> list[str]:
        """Those that the guest is told."""
        answer = await self.lookup(name, kind)
        return [record.address for rrset in answer.answer for record in rrset if hasattr(record, "address")]

    def raw(self, *, everything: bool = False) -> socket.socket:
        """A socket that sends frames as they are, out of the guest's interface; it may receive all, too."""
        found = socket_in(self.guest, socket.AF_PACKET, socket.SOCK_RAW)
        found.bind(("eth0", ETH_P_ALL if everything else 0))
        return found

    def send_frame(self, frame: bytes) -> None:
        with self.raw() as found:
            found.send(frame)

    # --- what is seen of it ---

    async def event(self, **wanted: object) -> NetworkEvent:
        """The first event like that, among those that were and those that come."""
        async with asyncio.timeout(120):
            async for event in self.guard.events():
                if all(getattr(event, name) == value for name, value in wanted.items()):
                    return event
        raise AssertionError(f"no event with {wanted}")

    async def events(self) -> list[NetworkEvent]:
        """Those so far. They are there once something that was sent after them is."""
        found = []
        async for event in self.guard.events():
            found.append(event)
            if len(found) == self.guard.remembered:
                break
        return found


HOSTS = {"hosted.example": FOURTH}
RECORDS = {
    ("good.example", "A"): [GOOD], ("good.example", "AAAA"): [GOOD6], ("good.example", "TXT"): ['"hello"'],
    ("second.example", "A"): [GOOD], ("other.example", "A"): [OTHER], ("evil.example", "A"): [OTHER],
    ("a.wild.example", "A"): [THIRD], ("alias.example", "CNAME"): ["target.example."], ("target.example", "A"): [THIRD],
    ("rebound.example", "A"): [GATEWAY], ("loop.example", "A"): ["127.0.0.1"], ("meta.example", "A"): [METADATA],
    ("mixed.example", "A"): [THIRD, "192.168.1.1"],
}  # fmt: skip


@asynccontextmanager
async def lab(
    allow: Sequence[str] | None, deny: Sequence[str] = (), *, bridge: bool = False, rate: object = None,
    ipv6: bool = True, mtu: int = 1500, known: bool = True,
) -> AsyncIterator[Lab]:  # fmt: skip
    """The world, with a policy in it; its gateway's MAC may have to be learned."""
    policy = policy_of(allow, deny, rate)
    assert policy is not None
    async with AsyncExitStack() as stack:
        guest, sandbox, outside = [await stack.enter_async_context(netns.made()) for _ in range(3)]
        tap = await _links(guest, sandbox, outside, bridge=bridge, mtu=mtu)
        world = World(outside)
        await stack.enter_async_context(_servers(world))
        resolver = await stack.enter_async_context(_resolver())
        neighbours = {GATEWAY: GATEWAY_MAC, GATEWAY6: GATEWAY_MAC} if known else {}
        mine = Tapped(tap, MAC, (GUEST, GUEST6) if ipv6 else (GUEST,), uplink="" if bridge else "uplink",
                      gateways=(GATEWAY, GATEWAY6), neighbours=neighbours)
        wanted = Wanted(policy=policy, hosts=HOSTS)
        made = await stack.enter_async_context(enforced(RUN_DIR, [mine], wanted, upstream=(resolver.address,)))
        (guard,) = made.guards
        assert isinstance(guard, Policing)
        yield Lab(guest, sandbox, world, resolver, guard)


@asynccontextmanager
async def surroundings(path: Path, resolver: tuple[str, int]) -> AsyncIterator[tuple[Netns, World, Resolver]]:
    """The world for a real guest, which takes the place of ``eth0`` of a namespace, pinned below ``path``."""
    async with AsyncExitStack() as stack:
        inside = await stack.enter_async_context(netns.made(path / "net"))
        outside = await stack.enter_async_context(netns.made())
        async with netlink(inside) as kernel:
            await kernel.add("eth0", "veth", peer={"ifname": "world", "net_ns_fd": outside.fd})
        await _inside(inside, 1500)
        await _outside(outside, 1500)
        world = World(outside)
        await stack.enter_async_context(_servers(world))
        yield inside, world, await stack.enter_async_context(_resolver(*resolver))


@asynccontextmanager
async def neighbourhood(path: Path, resolver: tuple[str, int]) -> AsyncIterator[tuple[Netns, World, Resolver]]:
    """The world for a host, which is a namespace: the caller goes :func:`~pykata.net.netns.inside`.

    Its loopback has a name server, the world is at the end of its ``up0``, and a service of its own listens.
    """
    async with AsyncExitStack() as stack:
        home = await stack.enter_async_context(netns.made(path / "home"))
        outside = await stack.enter_async_context(netns.made())
        async with netlink(home) as kernel:
            await kernel.add("up0", "veth", peer={"ifname": "world", "net_ns_fd": outside.fd})
            await _end(kernel, "up0", MAC, (f"{HOST}/24", f"{GUEST6}/64"), 1500)
            index = (await kernel.link("up0")).index
            await kernel.add_route(dst="0.0.0.0/0", gateway=GATEWAY)
            await kernel.add_route(dst="::/0", gateway=GATEWAY6, oif=index)
        await _outside(outside, 1500)
        world = World(outside)
        await stack.enter_async_context(_servers(world))
        with netns.inside(home):
            yield home, world, await stack.enter_async_context(_resolver(*resolver))


async def _links(guest: Netns, sandbox: Netns, world: Netns, *, bridge: bool, mtu: int) -> Tap:
    name = link_name(RUN_DIR, "t")
    async with netlink(sandbox) as kernel:
        await kernel.add(name, "veth", peer={"ifname": "eth0", "net_ns_fd": guest.fd})
        await kernel.add("uplink", "veth", peer={"ifname": "world", "net_ns_fd": world.fd})
        tap, uplink = await kernel.link(name), await kernel.link("uplink")
        if bridge:
            switch = await kernel.add("switch", "bridge")
            for each in (tap, uplink):
                await kernel.change(each.index, master=switch.index)
            await kernel.up(switch.index)
        for each in (tap, uplink):
            await kernel.up(each.index, mtu=mtu)
    await _inside(guest, mtu)
    await _outside(world, mtu)
    return Tap(name, tap.index, -1, sandbox)


async def _inside(guest: Netns, mtu: int) -> None:
    async with netlink(guest) as kernel:
        await _end(kernel, "eth0", MAC, (f"{GUEST}/24", f"{GUEST6}/64"), mtu)
        index = (await kernel.link("eth0")).index
        await kernel.add_route(dst="0.0.0.0/0", gateway=GATEWAY)
        await kernel.add_route(dst="::/0", gateway=GATEWAY6, oif=index)


async def _outside(world: Netns, mtu: int) -> None:
    async with netlink(world) as kernel:
        await _end(kernel, "world", GATEWAY_MAC, (f"{GATEWAY}/24", f"{NEIGHBOUR}/24", f"{GATEWAY6}/64"), mtu)
        lo = (await kernel.link("lo")).index
        for address in (GOOD, OTHER, THIRD, FOURTH, METADATA):
            await kernel.add_address(lo, f"{address}/32")
        await kernel.add_address(lo, f"{GOOD6}/128")


async def _end(kernel: Netlink, name: str, mac: str, addresses: Sequence[str], mtu: int) -> None:
    link = await kernel.link(name)
    await kernel.change(link.index, address=mac)
    for address in addresses:
        await kernel.add_address(link.index, address)
    await kernel.up(link.index, mtu=mtu)


@asynccontextmanager
async def _servers(world: World) -> AsyncIterator[None]:
    """They take what comes, keep it, and answer."""
    loop = asyncio.get_running_loop()
    connections: set[asyncio.Transport] = set()
    with ExitStack() as stack:
        for port in TCP_PORTS:
            listener = socket_in(world.netns, socket.AF_INET6, socket.SOCK_STREAM)
            listener.bind(("::", port))
            server = await loop.create_server(lambda: _Taker(world, connections), sock=listener)
            stack.callback(server.close)
        for port in UDP_PORTS:
            for address in (GOOD, OTHER, THIRD):
                datagrams = socket_in(world.netns, socket.AF_INET, socket.SOCK_DGRAM)
                datagrams.bind((address, port))
                transport, _ = await loop.create_datagram_endpoint(lambda: _Echo(world), sock=datagrams)
                stack.callback(transport.close)
        try:
            yield
        finally:
            for each in connections:
                each.abort()
    await asyncio.sleep(0)


class _Taker(asyncio.Protocol):
    def __init__(self, world: World, connections: set[asyncio.Transport]) -> None:
        self._world = world
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(transport)
        self._name = transport.get_extra_info("sockname")

    def data_received(self, data: bytes) -> None:
        address, port = self._name[:2]
        self._world.took(address.removeprefix("::ffff:"), port, data)
        self._transport.write(self._world.reply)


class _Echo(asyncio.DatagramProtocol):
    def __init__(self, world: World) -> None:
        self._world = world

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._world.took("udp", self._transport.get_extra_info("sockname")[1], data)
        self._transport.sendto(self._world.reply, addr)


@asynccontextmanager
async def _resolver(address: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Resolver]:
    resolver = Resolver(dict(RECORDS))

    class Server(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.DatagramTransport, transport)

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(resolver.answer(data), addr)

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Server, local_addr=(address, port))
    resolver.address = transport.get_extra_info("sockname")
    try:
        yield resolver
    finally:
        transport.close()
        await asyncio.sleep(0)


def client_hello(name: str | None = "good.example") -> bytes:
    """What a TLS client sends first."""
    import ssl

    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def record(kind: int, body: bytes) -> bytes:
    """One of TLS: 20 changes ciphers, 22 is of the handshake, 23 is what can't be read."""
    return struct.pack("!BHH", kind, 0x0303, len(body)) + body
