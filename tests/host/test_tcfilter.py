"""TCFilter, with a namespace in the guest's place."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import anyio
import pytest

from pykata.errors import ConfigError, NetworkError
from pykata.net.base import Wanted
from pykata.net.leftovers import undo_all
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, socket_in
from pykata.net.policy.rules import policy_of
from pykata.net.tcfilter import PRIORITY, TCFilter
from pykata.spec import Route
from tests.host.stand_in import stand_in
from tests.worlds import ping, run, world


@pytest.fixture
def sandbox_dir(tmp_path: Path) -> Path:
    path = tmp_path / "0123456789"
    path.mkdir()
    return path


@pytest.mark.parametrize("mtu", [1500, 9000])
async def test_the_guest_takes_the_interfaces_place(tmp_path: Path, sandbox_dir: Path, mtu: int) -> None:
    async with world(tmp_path, mtu=mtu) as (inside, outside):
        await run(inside, "ip", "neigh", "add", "10.1.0.9", "lladdr", "02:00:00:00:00:09", "dev", "eth0")
        async with netlink(inside) as kernel:
            before = await kernel.link("eth0")
        async with TCFilter(inside.path).attach(sandbox_dir, Wanted()) as attachment:
            (interface,) = attachment.interfaces
            assert (interface.name, interface.mac, interface.mtu) == ("eth0", before.mac, mtu)
            assert interface.addresses == ("10.1.0.2/24", "fd01::2/64")
            assert set(interface.routes) == {Route("0.0.0.0/0", "10.1.0.1"), Route("::/0", "fd01::1")}
            assert interface.neighbours == (("10.1.0.9", "02:00:00:00:00:09"),)
            async with stand_in(attachment) as guest:
                # Unfragmented, so that the packets are as large as they can be.
                for there, back in (("10.1.0.1", "10.1.0.2"), ("fd01::1", "fd01::2")):
                    size = mtu - 28 if "." in there else mtu - 48
                    assert "1 packets received" in await ping(guest, there, size)
                    assert "1 packets received" in await ping(outside, back, size)
        async with netlink(inside) as kernel:
            assert [each.name for each in await kernel.links()] == ["lo", "eth0"]
            after = await kernel.link("eth0")
            assert (after.mac, after.mtu, after.is_up) == (before.mac, mtu, True)
            assert "ingress" not in await kernel.qdiscs(before.index)
        # Who was there before has its place back.
        assert "1 packets received" in await ping(outside, "10.1.0.2")


async def test_any_number_of_interfaces(tmp_path: Path, sandbox_dir: Path) -> None:
    async with (
        world(tmp_path, interfaces=3) as (inside, outside),
        TCFilter(inside.path).attach(sandbox_dir, Wanted()) as attachment,
        stand_in(attachment) as guest,
    ):
        assert [each.name for each in attachment.interfaces] == ["eth0", "eth1", "eth2"]
        for number in (1, 2, 3):
            assert "1 packets received" in await ping(guest, f"10.{number}.0.1")
            assert "1 packets received" in await ping(outside, f"fd0{number}::2")


async def test_some_of_the_interfaces(tmp_path: Path, sandbox_dir: Path) -> None:
    async with (
        world(tmp_path, interfaces=2) as (inside, outside),
        TCFilter(inside.path, ["eth1"]).attach(sandbox_dir, Wanted()) as attachment,
    ):
        assert [each.name for each in attachment.interfaces] == ["eth1"]
        assert "1 packets received" in await ping(outside, "10.1.0.2")     # the other one is as it was


async def test_filters_that_were_there_stay(tmp_path: Path, sandbox_dir: Path) -> None:
    async with world(tmp_path) as (inside, _):
        await run(inside, "tc", "qdisc", "add", "dev", "eth0", "clsact")
        await run(inside, "tc", "filter", "add", "dev", "eth0", "ingress", "prio", "3", "protocol", "all", "u32",
                  "match", "u32", "0xfefefefe", "0xffffffff", "flowid", "1:1")
        async with TCFilter(inside.path).attach(sandbox_dir, Wanted()) as attachment, stand_in(attachment) as guest:
            assert "1 packets received" in await ping(guest, "10.1.0.1")
        async with netlink(inside) as kernel:
            index = (await kernel.link("eth0")).index
            assert "clsact" in await kernel.qdiscs(index)
            assert set(await kernel.filter_priorities(index)) == {3}


async def test_one_sandbox_at_a_time(tmp_path: Path, sandbox_dir: Path) -> None:
    async with world(tmp_path) as (inside, _):
        strategy = TCFilter(inside.path)
        other = tmp_path / "abcdefghij"
        other.mkdir()
        async with strategy.attach(sandbox_dir, Wanted()):
            with pytest.raises(NetworkError, match="another sandbox has the interface eth0"):
                async with strategy.attach(other, Wanted()):
                    pass
        async with strategy.attach(other, Wanted()):
            pass


async def test_what_a_killed_process_left_is_undone(tmp_path: Path, sandbox_dir: Path) -> None:
    async with world(tmp_path) as (inside, outside):
        async with TCFilter(inside.path).attach(sandbox_dir, Wanted()), netlink(inside) as kernel:
            index = (await kernel.link("eth0")).index
            assert PRIORITY in await kernel.filter_priorities(index)
            await undo_all(sandbox_dir)
            assert await kernel.filter_priorities(index) == []
            assert "ingress" not in await kernel.qdiscs(index)
            await undo_all(sandbox_dir)
        assert "1 packets received" in await ping(outside, "10.1.0.2")


async def test_a_policy_is_kept(tmp_path: Path, sandbox_dir: Path) -> None:
    wanted = Wanted(policy=policy_of(["10.1.0.1:80"], (), None))
    async with (
        world(tmp_path, interfaces=2) as (inside, outside),
        TCFilter(inside.path).attach(sandbox_dir, wanted) as attachment,
    ):
        assert len(attachment.guards) == 1
        with socket_in(outside, socket.AF_INET, socket.SOCK_STREAM) as server:
            server.bind(("10.1.0.1", 80))
            server.listen()
            async with stand_in(attachment) as guest:
                await _connected(guest, "10.1.0.1", 80)
                with pytest.raises(ConnectionRefusedError):
                    await _connected(guest, "10.1.0.1", 81)
        async with netlink(inside) as kernel:
            assert len([each for each in await kernel.links() if each.kind == "tun"]) > 1      # the policy's own


async def _connected(where: Netns, address: str, port: int) -> None:
    with socket_in(where, socket.AF_INET, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        with anyio.fail_after(300):
            await asyncio.get_running_loop().sock_connect(client, (address, port))


async def test_a_gateway_that_only_a_flag_makes_reachable(tmp_path: Path, sandbox_dir: Path) -> None:
    """As Calico and some clouds have it: an address of its own network, and a gateway beyond it."""
    async with world(tmp_path) as (inside, outside):
        await run(inside, "ip", "addr", "flush", "dev", "eth0")
        await run(inside, "ip", "-6", "route", "flush", "dev", "eth0")
        await run(inside, "ip", "addr", "add", "10.1.0.2/32", "dev", "eth0")
        await run(inside, "ip", "route", "add", "default", "via", "169.254.1.1", "dev", "eth0", "onlink")
        await run(outside, "ip", "addr", "add", "169.254.1.1/32", "dev", "to-eth0")
        async with TCFilter(inside.path).attach(sandbox_dir, Wanted()) as attachment, stand_in(attachment) as guest:
            assert attachment.interfaces[0].routes == (Route("169.254.1.1/32"), Route("0.0.0.0/0", "169.254.1.1"))
            assert "1 packets received" in await ping(guest, "10.1.0.1")


async def test_what_can_not_be_taken(tmp_path: Path, sandbox_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"tcfilter needs a network namespace"):
        TCFilter()
    with pytest.raises(ConfigError, match=r"interfaces='eth0' is not a list"):
        TCFilter("blue", "eth0")  # type: ignore[arg-type]
    async with world(tmp_path) as (inside, _):
        async def refused(*names: str) -> str:
            with pytest.raises(NetworkError) as caught:
                async with TCFilter(inside.path, names).attach(sandbox_dir, Wanted()):
                    pass
            return str(caught.value)

        assert "there is no interface 'eth7'" in await refused("eth7")
        assert "lo is the loopback" in await refused("lo")
        await run(inside, "ip", "addr", "flush", "dev", "eth0")
        assert "eth0 has no address" in await refused("eth0")
        await run(inside, "ip", "link", "set", "eth0", "down")
        assert "eth0 is down" in await refused()
