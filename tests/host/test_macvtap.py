"""MacVTap, with a namespace in the guest's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykata import Network, Sandbox
from pykata.errors import ConfigError
from pykata.net.base import Wanted
from pykata.net.leftovers import undo_all
from pykata.net.macvtap import MacVTap
from pykata.net.netlink import netlink
from pykata.net.netns import Netns
from tests.host.stand_in import stand_in
from tests.worlds import ping, run, world


@pytest.fixture
def sandbox_dir(tmp_path: Path) -> Path:
    path = tmp_path / "0123456789"
    path.mkdir()
    return path


async def routes(where: Netns, family: str) -> set[str]:
    return set((await run(where, "ip", family, "route")).splitlines())


@pytest.mark.parametrize("mtu", [1500, 9000])
async def test_the_guest_takes_the_interfaces_place(tmp_path: Path, sandbox_dir: Path, mtu: int) -> None:
    async with world(tmp_path, mtu=mtu, interfaces=2) as (inside, outside):
        said = [await routes(inside, family) for family in ("-4", "-6")]
        async with netlink(inside) as kernel:
            before = [await kernel.link("eth0"), await kernel.link("eth1")]
        async with MacVTap(inside.path).attach(sandbox_dir, Wanted()) as attachment:
            assert "macvtap" in await run(inside, "ip", "-d", "link", "show", "type", "macvtap")
            assert [each.mac for each in attachment.interfaces] == [each.mac for each in before]
            async with stand_in(attachment) as guest:
                for number in (1, 2):
                    for network in (f"10.{number}.0.", f"fd0{number}::"):
                        size = mtu - 28 if "." in network else mtu - 48
                        assert "1 packets received" in await ping(guest, f"{network}1", size)
                        assert "1 packets received" in await ping(outside, f"{network}2", size)
        async with netlink(inside) as kernel:
            assert [each.name for each in await kernel.links()] == ["lo", "eth0", "eth1"]
            assert [(await kernel.link(each.name)).mac for each in before] == [each.mac for each in before]
        assert [await routes(inside, family) for family in ("-4", "-6")] == said
        assert "1 packets received" in await ping(outside, "10.1.0.2")


async def test_what_a_killed_process_left_is_undone(tmp_path: Path, sandbox_dir: Path) -> None:
    async with world(tmp_path) as (inside, outside), MacVTap(inside.path).attach(sandbox_dir, Wanted()):
        await undo_all(sandbox_dir)
        assert "1 packets received" in await ping(outside, "10.1.0.2")
        assert "1 packets received" in await ping(outside, "fd01::2")


def test_a_policy_is_refused_and_others_are_named() -> None:
    with pytest.raises(ConfigError, match=r"network 'macvtap' can't enforce.*these can:.*tcfilter"):
        Sandbox(network=Network(MacVTap("blue"), allow=["pypi.org"]))
    with pytest.raises(ConfigError, match="macvtap needs a network namespace"):
        MacVTap()
