"""Namespaces, links and taps: what networks are made of."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from pykata.errors import NetworkError, NotPermittedError
from pykata.net import netns
from pykata.net.netlink import netlink
from pykata.net.tap import link_name, open_tap, tap


async def test_a_namespace_is_made_entered_and_gone() -> None:
    outside = os.readlink("/proc/thread-self/ns/net")
    async with netns.made() as made:
        with netns.inside(made):
            assert os.readlink("/proc/thread-self/ns/net") == f"net:[{made.identity.partition(':')[2]}]"
            assert [name for _, name in socket.if_nameindex()] == ["lo"]
            # Its loopback is up: an address of its own can be connected.
            with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
                client.connect(server.getsockname())
        assert os.readlink("/proc/thread-self/ns/net") == outside


async def test_a_pinned_namespace_has_a_path_until_the_block_ends(tmp_path: Path) -> None:
    async with netns.made(tmp_path / "net") as made:
        with netns.opened(tmp_path / "net") as again:
            assert again == made
    assert not (tmp_path / "net").exists()


async def test_one_who_is_cancelled_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with netns.made(tmp_path / "net"):
            await anyio.sleep_forever()
    assert not (tmp_path / "net").exists()


def test_what_is_no_namespace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="there is no network namespace /run/netns/nosuch"), netns.opened("nosuch"):
        pass
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", Path("/proc/self/ns/mnt")):
        with pytest.raises(NetworkError, match="is not a network namespace"), netns.opened(path):
            pass


async def test_links_addresses_and_routes() -> None:
    async with netns.made() as made, netlink(made) as kernel:
        link = await kernel.add("left", "veth", peer={"ifname": "right"})
        await kernel.up((await kernel.link("right")).index)
        await kernel.up(link.index, mtu=9000)
        for address in ("10.1.0.2/24", "fd01::2/64"):
            await kernel.add_address(link.index, address)
            await kernel.add_address(link.index, address)
        await kernel.add_route(dst="0.0.0.0/0", gateway="10.1.0.1")
        assert await kernel.addresses(link.index) == ["10.1.0.2/24", "fd01::2/64"]
        found = {each.destination: each.gateway for each in await kernel.routes(link.index)}
        assert found == {"0.0.0.0/0": "10.1.0.1", "10.1.0.0/24": "", "fd01::/64": ""}
        assert (await kernel.link("left")).mtu == 9000
        assert {each.name for each in await kernel.links() if each.kind == "veth"} == {"left", "right"}
        with pytest.raises(NetworkError, match=r"no interface 'nosuch'.*it has lo"):
            await kernel.link("nosuch")
        with pytest.raises(NetworkError, match="can't make the veth interface left: File exists"):
            await kernel.add("left", "veth", peer={"ifname": "other"})
        await kernel.delete(link.index)
        await kernel.delete(link.index)
        assert [each.name for each in await kernel.links()] == ["lo"]


async def test_a_filter_is_removed_and_others_stay() -> None:
    async with netns.made() as made, netlink(made) as kernel:
        one, other = await kernel.add("one", "veth", peer={"ifname": "other"}), await kernel.link("other")
        assert await kernel.add_ingress(one.index)
        assert not await kernel.add_ingress(one.index)
        for priority in (5, 7):
            await kernel.redirect(one.index, other.index, priority=priority)
        await kernel.delete_filters(one.index, priority=5)
        assert set(await kernel.filter_priorities(one.index)) == {7}
        await kernel.delete_ingress(one.index)
        await kernel.delete_ingress(one.index)
        assert "ingress" not in await kernel.qdiscs(one.index)


async def test_a_tap_is_in_its_namespace_and_carries_frames(tmp_path: Path) -> None:
    async with netns.made() as made, tap(made, link_name(tmp_path, "t0"), mtu=9000) as made_tap:
        async with netlink(made) as kernel:
            link = await kernel.link(made_tap.name)
            assert (link.is_up, link.mtu, link.index) == (True, 9000, made_tap.index)
        with netns.socket_in(made, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire:
            wire.bind((made_tap.name, 0))
            frame = b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + b"hello" * 10
            os.write(made_tap.fd, bytes(10) + frame)        # a virtio_net_hdr comes first
            while (got := wire.recv(2000)) != frame:
                assert got
    assert made_tap.name not in [name for _, name in socket.if_nameindex()]


async def test_a_taps_name_that_is_taken_or_too_long() -> None:
    async with netns.made() as made, tap(made, "taken"):
        with pytest.raises(NetworkError, match="can't make the tap taken"):
            open_tap(made, "taken")
        with pytest.raises(NetworkError, match="has more than 15 bytes"):
            open_tap(made, "sixteen-letters-")


def test_without_privileges_it_is_said_which_are_lacking() -> None:
    netns.require("NET_ADMIN", "SYS_ADMIN")
    code = "from pykata.net import netns; netns.require('NET_ADMIN', 'SYS_ADMIN')"
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    done = subprocess.run([*drop, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{NotPermittedError.__name__}: this process lacks CAP_NET_ADMIN and CAP_SYS_ADMIN" in done.stderr
