"""Many sandboxes with networks, and those that are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import anyio
import pytest

import pykata
from pykata import Bridge, Network, Rate, Sandbox
from pykata.host import PIPE, run_root, spawn
from pykata.net import netns
from pykata.net.netlink import netlink
from pykata.net.netns import Netns
from pykata.net.owned import PLACE
from tests.vm.conftest import until
from tests.worlds import run

BUSYBOX = "builtin:busybox"


async def of_host() -> tuple[list[str], list[str], int]:
    """Ours among the links and rules of the host, and how many namespaces are pinned."""
    with netns.opened() as host:
        async with netlink(host) as kernel:
            links = [each.name for each in await kernel.links() if each.name.startswith("pk")]
        rules = [each for each in (await run(host, "nft", "list", "tables")).splitlines() if "pykata" in each]
    mounts = (await anyio.Path("/proc/self/mountinfo").read_text()).splitlines()
    return links, rules, sum(" nsfs " in each and str(run_root()) in each for each in mounts)


async def within(place: Netns) -> tuple[dict[str, list[str]], str]:
    """The links of a namespace with their queueing disciplines, and its tables of nftables."""
    async with netlink(place) as kernel:
        links = {each.name: await kernel.qdiscs(each.index) for each in await kernel.links()}
    return links, await run(place, "nft", "list", "tables")


async def _come_and_go(count: int, path: Path) -> None:
    """Half of them in a network of pykata's own, half on a bridge that stays, with a policy: tables and disciplines."""
    async with netns.made(path / "net") as place:
        async with netlink(place) as kernel:
            bridge = await kernel.add("br0", "bridge", address="02:00:00:00:00:01")
            await kernel.add_address(bridge.index, "10.5.0.1/24")
            await kernel.up(bridge.index)
        before, before_there = await of_host(), await within(place)
        lab = Network(Bridge(network="many", ipv6=True))
        policed = Network(Bridge("br0", netns=place.path), allow=["10.5.0.1"], rate=Rate(bits_per_second=10_000_000))
        seen: set[str] = set()
        at_work: list[int] = []

        async def one(number: int) -> None:
            network = policed if number % 2 else lab
            async with Sandbox(network=network, hostname=f"box{number}", isolation="emulated", memory=96) as sb:
                seen.add(sb.network.addresses[0])
                gateway = sb.network.addresses[0].rpartition(".")[0] + ".1"
                done = await sb.shell(BUSYBOX, until(f"ping -c 1 -W 10 {gateway}"))
                assert "1 packets received" in done.stdout
                links, tables = await within(place)
                at_work.append(tables.count("pykata") + sum("tbf" in each for each in links.values()))

        async with anyio.create_task_group() as tasks:
            for number in range(count):
                tasks.start_soon(one, number)
        assert 0 < len(seen) <= count
        assert max(at_work) >= 2        # there was something to leave
        assert await of_host() == before
        assert await within(place) == before_there


async def test_some_at_a_time_leave_nothing(tmp_path: Path) -> None:
    await _come_and_go(6, tmp_path)


@pytest.mark.slow
async def test_fifty_at_a_time_leave_nothing(tmp_path: Path) -> None:
    await _come_and_go(50, tmp_path)


CHILD = """
import asyncio, json, sys, pykata
async def main():
    path, network = sys.argv[1:]
    async with (
        pykata.Sandbox(network=pykata.TCFilter(path), isolation="emulated") as one,
        pykata.Sandbox(network=pykata.Bridge(network=network), isolation="emulated") as other,
    ):
        print(json.dumps([str(each._open.run_dir) for each in (one, other)]), flush=True)
        await asyncio.sleep(1000)
asyncio.run(main())
"""


async def test_what_a_killed_process_leaves_is_collected(tmp_path: Path) -> None:
    from tests.worlds import ping, world

    async with world(tmp_path) as (inside, outside):
        before = await of_host()
        argv = [sys.executable, "-c", CHILD, inside.path, "killed"]
        async with spawn(argv, stdout=PIPE, env=dict(os.environ)) as child:
            assert child.stdout is not None
            said = b""
            while not said.endswith(b"\n"):
                said += await child.stdout.receive()
            directories = [Path(each) for each in json.loads(said)]
            child.send_signal(signal.SIGKILL)
            await child.wait()
        removed = await pykata.collect_garbage()
        assert {*directories, directories[0].parent / PLACE / "killed"} <= set(removed)
        assert await of_host() == before
        async with netlink(inside) as kernel:
            assert "ingress" not in await kernel.qdiscs((await kernel.link("eth0")).index)
        assert "1 packets received" in await ping(outside, "10.1.0.2")
