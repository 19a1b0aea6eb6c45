"""Bridges, with namespaces in the guests' place."""

from __future__ import annotations

import asyncio
import errno
import itertools
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio
import pytest

from pykata.errors import AddressesExhaustedError, ConfigError, NetworkError, ToolFailedError
from pykata.net import netns, owned
from pykata.net.base import Wanted
from pykata.net.bridge import Bridge
from pykata.net.netlink import netlink
from pykata.net.netns import Netns
from pykata.net.policy.rules import policy_of
from pykata.spec import Attachment, Port, Route
from tests.host.stand_in import stand_in
from tests.worlds import ping, run


@pytest.fixture
def dirs(tmp_path: Path) -> Iterator[Path]:
    def made() -> Iterator[Path]:
        for number in itertools.count():
            path = tmp_path / f"{number:010}"
            path.mkdir()
            yield path

    return made()


@asynccontextmanager
async def guest(
    bridge: Bridge, dirs: Iterator[Path], hostname: str = "guest", wanted: Wanted | None = None
) -> AsyncIterator[tuple[Netns, Attachment]]:
    wanted = wanted or Wanted(hostname=hostname)
    async with bridge.attach(next(dirs), wanted) as attachment, stand_in(attachment) as made:
        yield made, attachment


def address(attachment: Attachment, family: int = 4) -> str:
    found = [each.partition("/")[0] for each in attachment.interfaces[0].addresses]
    return next(each for each in found if (":" in each) == (family == 6))


async def unreachable(where: Netns, there: str) -> bool:
    try:
        await run(where, "busybox", "ping", "-c", "1", "-W", "2", there, timeout=20)
    except ToolFailedError:
        return True
    return False


async def changes_of_host() -> list[str]:
    """What a network of ours may change on the host; others may have networks at the same time."""
    with netns.opened() as host:
        said = [await run(host, *each.split()) for each in ("ip -br link", "ip route", "nft list tables")]
    return [line for text in said for line in text.splitlines() if "10.89." in line or "pykata-pk" in line]


async def test_two_guests_reach_each_other_and_the_gateway(dirs: Iterator[Path]) -> None:
    before = await changes_of_host()
    bridge = Bridge(network="two", ipv6=True)
    async with guest(bridge, dirs, "one") as (one, first), guest(bridge, dirs, "other") as (_, second):
        for family in (4, 6):
            assert "1 packets received" in await ping(one, address(second, family))
        for route in first.interfaces[0].routes:
            assert "1 packets received" in await ping(one, route.gateway)
        with netns.opened() as host:
            assert "1 packets received" in await ping(host, address(first))
            async with netlink(host) as kernel:     # the host is reached by no address of its own
                (link,) = [each for each in await kernel.links() if each.name == _plan("two").link]
                (own,) = await kernel.addresses(link.index)
        assert await unreachable(one, own.partition("/")[0])
    assert await changes_of_host() == before


def _plan(network: str) -> owned.Plan:
    return owned._read(owned.place() / network)


async def test_what_is_beyond_the_host_is_reached_with_its_address(dirs: Iterator[Path]) -> None:
    async with (
        beyond() as outside,
        guest(Bridge(network="out"), dirs) as (one, _),
        guest(Bridge(network="out", isolated=True), dirs) as (other, _),
    ):
        for each in (one, other):
            assert "1 packets received" in await ping(each, "198.51.100.2")
        # Nobody gets in, even one who knows the way.
        await run(outside, "ip", "route", "add", _plan("out").subnet, "via", "198.51.100.1")
        assert await unreachable(outside, _plan("out").address(2).partition("/")[0])


async def test_the_connections_of_a_guest_have_an_end(dirs: Iterator[Path]) -> None:
    """The host's table of connections is for all: a guest that opens more than its share is told so at once."""
    bridge = Bridge(network="share", connections=20)
    async with beyond() as outside, guest(bridge, dirs) as (one, first), guest(bridge, dirs) as (other, _):
        with netns.socket_in(outside, socket.AF_INET, socket.SOCK_STREAM) as server, ExitStack() as stack:
            server.bind(("198.51.100.2", 9000))
            server.listen(100)
            clients = [stack.enter_context(await connected(one, "198.51.100.2")) for _ in range(20)]
            for _ in range(5):
                with pytest.raises(OSError, check=lambda exc: exc.errno == errno.EHOSTUNREACH):
                    await connected(one, "198.51.100.2")
            (await connected(other, "198.51.100.2")).close()        # its own share
            # Answers are no part of it: the host still reaches the guest.
            with netns.opened() as host:
                assert "1 packets received" in await ping(host, address(first))
                said = await run(host, "nft", "list", "chain", "inet", f"pykata-{_plan('share').link}", "begun")
            # A SYN whose answer takes longer than a second is sent again.
            counted = re.search(r"counter packets (\d+) ", said)
            assert counted is not None
            assert int(counted[1]) >= 5
            for each in clients[:10]:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.close()
            for _ in range(10):
                await anyio.sleep(0.03)     # the kernel looks for ended ones once a tick, some at a time
                stack.enter_context(await connected(one, "198.51.100.2"))


async def connected(where: Netns, there: str) -> socket.socket:
    client = netns.socket_in(where, socket.AF_INET, socket.SOCK_STREAM)
    try:
        client.setblocking(False)
        async with asyncio.timeout(120):
            await asyncio.get_running_loop().sock_connect(client, (there, 9000))
    except BaseException:
        client.close()
        raise
    return client


async def test_other_senders_than_guests_of_the_network_do_not_get_out(dirs: Iterator[Path]) -> None:
    async with beyond() as outside, guest(Bridge(network="out"), dirs) as (one, _):
        await run(outside, "ip", "route", "add", "203.0.113.0/24", "via", "198.51.100.1")
        await run(one, "ip", "addr", "add", "203.0.113.7/32", "dev", "eth0")
        with (
            netns.socket_in(outside, socket.AF_INET, socket.SOCK_DGRAM) as server,
            netns.socket_in(one, socket.AF_INET, socket.SOCK_DGRAM) as client,
            netns.socket_in(one, socket.AF_INET, socket.SOCK_DGRAM) as liar,
        ):
            server.bind(("198.51.100.2", 9000))
            server.setblocking(False)
            liar.bind(("203.0.113.7", 0))
            for each in (liar, client):
                each.sendto(each.getsockname()[0].encode(), ("198.51.100.2", 9000))
            async with asyncio.timeout(120):
                came, sender = await asyncio.get_running_loop().sock_recvfrom(server, 100)
            assert (came, sender[0]) == (b"0.0.0.0", "198.51.100.1")


@asynccontextmanager
async def beyond() -> AsyncIterator[Netns]:
    """A namespace that the host reaches, and that knows the way to nowhere else."""
    async with netns.made() as outside:
        with netns.opened() as host:
            async with netlink(host) as kernel, netlink(outside) as there:
                link = await kernel.add("pkbeyond", "veth", peer={"ifname": "eth0", "net_ns_fd": outside.fd})
                try:
                    await kernel.add_address(link.index, "198.51.100.1/24")
                    await kernel.up(link.index)
                    (Path("/proc/sys/net/ipv4/conf") / link.name / "forwarding").write_text("1")
                    far = (await there.link("eth0")).index
                    await there.add_address(far, "198.51.100.2/24")
                    await there.up(far)
                    yield outside
                finally:
                    await kernel.delete(link.index)


async def test_isolated_guests_do_not_reach_each_other_on_any_way(dirs: Iterator[Path]) -> None:
    bridge = Bridge(network="apart", isolated=True)
    async with (
        guest(bridge, dirs) as (one, first),
        guest(bridge, dirs) as (_, second),
        guest(Bridge(network="apart"), dirs) as (_, third),
    ):
        assert await unreachable(one, address(second))
        assert "1 packets received" in await ping(one, address(third))      # who isn't isolated is reached
        # By the gateway, which has another port for it.
        gateway = first.interfaces[0].routes[0].gateway
        await run(one, "ip", "route", "add", f"{address(second)}/32", "via", gateway)
        assert await unreachable(one, address(second))


async def test_the_gateway_stays_where_it_is_while_others_come_and_go(dirs: Iterator[Path]) -> None:
    bridge = Bridge(network="steady")
    async with guest(bridge, dirs, "one") as (one, first):
        gateway = first.interfaces[0].routes[0].gateway

        async def seen_at() -> str:
            await run(one, "ip", "neigh", "flush", "all")
            await ping(one, gateway)
            return (await run(one, "ip", "neigh", "show", gateway)).split(" lladdr ")[1].split()[0]

        places = [await seen_at()]
        for name in ("a", "b", "c"):
            async with guest(bridge, dirs, name):
                places.append(await seen_at())
        assert set(places) == {places[0]}


async def test_guests_have_names_as_long_as_they_are_there(dirs: Iterator[Path]) -> None:
    bridge = Bridge(network="named", ipv6=True)
    async with guest(bridge, dirs, "one") as (one, first):
        (server,) = first.nameservers

        async def looked_up(name: str) -> str:
            try:
                return await run(one, "busybox", "nslookup", name, server)
            except ToolFailedError as error:
                return error.output

        async with guest(bridge, dirs, "Other") as (_, second):
            said = await looked_up("other")
            assert address(second) in said
            assert address(second, 6) in said
            # Its questions are the guest's own: another guest is not answered.
        assert address(second) not in await looked_up("other")
        assert address(first) in await looked_up("one")


async def test_addresses_come_back_and_run_out(dirs: Iterator[Path]) -> None:
    bridge = Bridge(network="small", subnet="10.88.7.0/28")     # 2 to 6, and their name servers
    async with guest(bridge, dirs) as (_, first):
        async with guest(bridge, dirs) as (_, second):
            assert (address(first), address(second)) == ("10.88.7.2", "10.88.7.3")
        async with guest(bridge, dirs) as (_, again):
            assert address(again) == "10.88.7.3"
            async with guest(bridge, dirs), guest(bridge, dirs), guest(bridge, dirs):
                with pytest.raises(AddressesExhaustedError, match="every address of the network 'small'"):
                    async with guest(bridge, dirs):
                        pass
        with pytest.raises(NetworkError, match="with other options"):
            async with Bridge(network="small", ipv6=True).attach(next(dirs), Wanted()):
                pass
    assert not (owned.place() / "small").exists()


async def test_a_network_whose_sandboxes_were_killed_is_collected(dirs: Iterator[Path]) -> None:
    before = await changes_of_host()
    plan = await owned._new("lost", owned.Asked(subnet="", ipv6=False, host=False, connections=9))
    owned._write(plan, owned.place() / "lost")
    await owned._make(plan, owned.place() / "lost")
    async with guest(Bridge(network="used"), dirs):
        assert await owned.collect() == [owned.place() / "lost"]
        assert (owned.place() / "used").exists()
    assert await changes_of_host() == before


async def test_on_a_bridge_that_exists(dirs: Iterator[Path], tmp_path: Path) -> None:
    async with netns.made(tmp_path / "net") as inside:
        async with netlink(inside) as kernel:
            made = await kernel.add("br0", "bridge")
            await kernel.add_address(made.index, "10.5.0.1/24")
            await kernel.up(made.index, mtu=9000)
        bridge = Bridge("br0", netns=inside.path)
        async with guest(bridge, dirs) as (one, first), guest(bridge, dirs) as (_, second):
            assert first.interfaces[0].addresses == ("10.5.0.2/24",)
            assert first.interfaces[0].routes == (Route("0.0.0.0/0", "10.5.0.1"),)
            assert "1 packets received" in await ping(one, address(second), 8900)
            assert "1 packets received" in await ping(inside, address(first))
        given = Bridge("br0", netns=inside.path, addresses=["10.5.0.77/24", "fd05::77/64"], gateway="10.5.0.9")
        async with guest(given, dirs) as (_, third):
            assert third.interfaces[0].addresses == ("10.5.0.77/24", "fd05::77/64")
            assert third.interfaces[0].routes == (Route("0.0.0.0/0", "10.5.0.9"),)
        async with netlink(inside) as kernel:
            assert [each.name for each in await kernel.links()] == ["lo", "br0"]
            assert (await kernel.link("br0")).is_up


async def test_a_policy_is_kept(dirs: Iterator[Path]) -> None:
    bridge = Bridge(network="kept")
    wanted = Wanted(policy=policy_of(["10.89.0.0/16"], (), None))
    async with guest(bridge, dirs) as (_, free), guest(bridge, dirs, wanted=wanted) as (held, attachment):
        assert attachment.guards
        assert "1 packets received" in await ping(held, address(free))
        assert await unreachable(held, "198.51.100.2")


async def test_ports_are_published(dirs: Iterator[Path]) -> None:
    loop = asyncio.get_running_loop()
    for strategy in (Bridge(network="ports"), Bridge(network="ports", isolated=True)):
        async with guest(strategy, dirs, wanted=Wanted(ports=(Port(80),))) as (inside, attachment):
            (port,) = attachment.published
            with netns.socket_in(inside, socket.AF_INET, socket.SOCK_STREAM) as server, socket.socket() as client:
                server.bind((address(attachment), 80))
                server.listen()
                for each in (server, client):
                    each.setblocking(False)
                with anyio.fail_after(300):
                    await loop.sock_connect(client, (port.address, port.host))
                    connection, _ = await loop.sock_accept(server)
                    with connection:
                        await loop.sock_sendall(connection, b"hello")
                        assert await loop.sock_recv(client, 100) == b"hello"


async def test_what_can_not_be_used(dirs: Iterator[Path], tmp_path: Path) -> None:
    for wrong, message in (
        ({"subnet": "10.0.0.0/30"}, "8 to 28 bits"), ({"subnet": "ten"}, "subnet='ten'"),
        ({"network": "../up"}, "no name of a network"), ({"addresses": ["10.0.0.5/24"]}, "for a bridge that exists"),
        ({"name": "br0", "ipv6": True}, "for a network of pykata's own"),
        ({"name": "br0", "connections": 7}, "for a network of pykata's own"),
        ({"connections": 0}, "connections=0 is no limit"), ({"connections": True}, "connections=True"),
        ({"connections": 1_000_001}, "from 1 to 1000000"),
        ({"name": "br0", "addresses": ["ten"]}, "addresses="), ({"name": "br0", "gateway": "ten"}, "gateway='ten'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Bridge(**wrong)
    async with netns.made(tmp_path / "net") as inside:
        async with netlink(inside) as kernel:
            await kernel.add("br0", "bridge")
            await kernel.add("veth0", "veth", peer={"ifname": "veth1"})

        async def refused(name: str) -> str:
            with pytest.raises(NetworkError) as caught:
                async with Bridge(name, netns=inside.path).attach(next(dirs), Wanted()):
                    pass
            return str(caught.value)

        assert "no interface 'br7'" in await refused("br7")
        assert "'veth0' is no bridge, but veth" in await refused("veth0")
        assert "'br0' is down" in await refused("br0")
        await run(inside, "ip", "link", "set", "br0", "up")
        assert "has no IPv4 network to take an address of" in await refused("br0")
