"""A network namespace in the guest's place: what is put in front of a machine is tried without one.

Its interfaces are taps of its own, and what goes into one comes out of the tap that the guest would have.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

from pykata.net import netns
from pykata.net.netlink import netlink
from pykata.net.netns import Netns
from pykata.net.tap import tap
from pykata.spec import Attachment, Interface, Nic
from tests.worlds import run

MOST = 66_000


@asynccontextmanager
async def stand_in(attachment: Attachment) -> AsyncIterator[Netns]:
    """A namespace with the interfaces of a guest, connected as the guest would be."""
    nics = {each.mac: each for each in attachment.devices if isinstance(each, Nic)}
    async with netns.made() as made, AsyncExitStack() as stack:
        for interface in attachment.interfaces:
            own = await stack.enter_async_context(tap(made, interface.name, mtu=interface.mtu or 1500))
            await _set_up(made, interface)
            stack.enter_context(_pumped(own.fd, nics[interface.mac].fds[0]))
        yield made


async def _set_up(made: Netns, interface: Interface) -> None:
    async with netlink(made) as kernel:
        index = (await kernel.link(interface.name)).index
        await kernel.change(index, address=interface.mac)
        for address in interface.addresses:
            await kernel.add_address(index, address)
        for route in sorted(interface.routes, key=lambda each: bool(each.gateway)):
            gateway = {"gateway": route.gateway} if route.gateway else {"scope": 253}
            await kernel.add_route(dst=route.destination, oif=index, **gateway)
        for address, mac in interface.neighbours:
            await run(made, "ip", "neigh", "add", address, "lladdr", mac, "dev", interface.name, "nud", "permanent")


@contextmanager
def _pumped(one: int, other: int) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for here, there in ((one, other), (other, one)):
        loop.add_reader(here, _move, here, there)
    try:
        yield
    finally:
        for end in (one, other):
            loop.remove_reader(end)


def _move(here: int, there: int) -> None:
    with suppress(BlockingIOError, OSError):
        for _ in range(64):
            os.write(there, os.read(here, MOST))
