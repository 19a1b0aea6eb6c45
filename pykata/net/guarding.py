"""The policy of a network with taps, and what of it outlives a process that is killed."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pykata.errors import NetworkError
from pykata.net.base import Wanted
from pykata.net.leftovers import recorded
from pykata.net.netns import opened, socket_in
from pykata.spec import Attachment

if TYPE_CHECKING:
    from pykata.net.policy.enforce import Tapped
    from pykata.net.policy.resolve import Server


@asynccontextmanager
async def guarding(
    run_dir: Path, taps: Sequence[Tapped], wanted: Wanted, *, upstream: Sequence[Server] = (),
    known: Callable[[str], Sequence[str]] = lambda _: (),
) -> AsyncIterator[Attachment]:  # fmt: skip
    """Keep the policy that is wanted, if one is; the tables that this takes are written down. See ``enforced``."""
    if wanted.policy is None:
        yield Attachment()
        return
    from pykata.net.policy.enforce import enforced
    from pykata.net.policy.plumbing import table_name

    async with AsyncExitStack() as stack:
        for each in taps:
            where = {"netns": each.tap.netns.path, "identity": each.tap.netns.identity}
            await stack.enter_async_context(recorded(run_dir, "table", name=table_name(each.tap.name), **where))
        yield await stack.enter_async_context(enforced(run_dir, taps, wanted, upstream=upstream, known=known))


async def without_table(netns: str, identity: str, name: str) -> None:
    """Remove a table of nftables from a namespace, if both are there."""
    from pykata.net.policy.elements import NETLINK_NETFILTER, delete_table

    with suppress(NetworkError), opened(netns) as found:
        if found.identity == identity:
            with socket_in(found, socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as kernel:
                kernel.bind((0, 0))
                delete_table(kernel, name)
