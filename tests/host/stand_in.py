"""A network namespace in the guest's place: what is put in front of a machine is tried without one.

Its interfaces are taps of its own, and what goes into one comes out of the tap that the guest would have.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

from pykata.net import netns
from pykata.net.netlink import netlink
from pykata.net.netns import Netns
from pykata.net.tap import IFF_VNET_HDR, tap
from pykata.spec import Attachment, Interface, Nic
from tests.worlds import run

MOST = 66_000
TUNGETIFF = 0x800454D2


def has_vnet_header(fd: int) -> bool:
    """Is there a virtio_net_hdr in front of each frame of this tap?"""
    flags: int = struct.unpack_from("H", fcntl.ioctl(fd, TUNGETIFF, bytes(40)), 16)[0]
    return bool(flags & IFF_VNET_HDR)


@asynccontextmanager
async def stand_in(attachment: Attachment) -> AsyncIterator[Netns]:
    """A namespace with the interfaces of a guest, connected as the guest would be."""
    nics = {each.mac: each for each in attachment.devices if isinstance(each, Nic)}
    async with netns.made() as made, AsyncExitStack() as stack:
        for interface in attachment.interfaces:
            other = nics[interface.mac].fds[0]
            headers = has_vnet_header(other)
            own = tap(made, interface.name, mtu=interface.mtu or 1500, vnet_header=headers)
            mine = await stack.enter_async_context(own)
            await _set_up(made, interface)
            stack.enter_context(_pumped(mine.fd, other))
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
