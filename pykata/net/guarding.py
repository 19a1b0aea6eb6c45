"""A policy at the tap of a network that has one: what the strategies with taps share."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from pykata.errors import NetworkError
from pykata.net.base import Wanted
from pykata.net.leftovers import recorded
from pykata.net.netns import opened, socket_in
from pykata.net.tap import Tap
from pykata.spec import Attachment


@asynccontextmanager
async def guarding(
    tap: Tap, run_dir: Path, wanted: Wanted, *, mac: str, addresses: Sequence[str], uplink: str = ""
) -> AsyncIterator[Attachment]:
    """Keep the policy that is wanted at the tap; yields the guard, and the name servers that the guest has by it."""
    from pykata.net.policy.guard import RESOLVER, RESOLVER6, Guarded, guarded
    from pykata.net.policy.plumbing import table_name

    assert wanted.policy is not None
    servers = [RESOLVER]
    if any(":" in each for each in addresses):
        servers.append(RESOLVER6)
    about = Guarded(
        run_dir=run_dir, mac=mac, addresses=addresses, policy=wanted.policy, uplink=uplink, dns=wanted.dns
    )
    where = {"netns": tap.netns.path, "identity": tap.netns.identity}
    async with recorded(run_dir, "table", name=table_name(tap.name), **where), guarded(tap, about) as guard:
        resolves = wanted.policy.restricts and not wanted.dns
        yield Attachment(guards=(guard,), lost=(guard.lost,), nameservers=tuple(servers) if resolves else ())


async def without_table(netns: str, identity: str, name: str) -> None:
    """Remove a table of nftables from a namespace, if both are there."""
    from pykata.net.policy.elements import NETLINK_NETFILTER, delete_table

    with suppress(NetworkError), opened(netns) as found:
        if found.identity == identity:
            with socket_in(found, socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as kernel:
                kernel.bind((0, 0))
                delete_table(kernel, name)
