"""A guest on a macvtap of a network namespace's interface: packets pass from one to the other within the kernel."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from attrs import field, frozen

from pykata.errors import ConfigError, NetworkError
from pykata.net.base import NetworkStrategy, Wanted
from pykata.net.chardev import open_macvtap
from pykata.net.endpoints import Endpoint, endpoints
from pykata.net.leftovers import recorded
from pykata.net.netlink import BY_KERNEL, netlink
from pykata.net.netns import Netns, inside, opened, require
from pykata.net.tap import Tap, link_name
from pykata.net.tcfilter import interface_names
from pykata.spec import Attachment


def _netns(value: str | Path | None) -> str | Path:
    if not value:
        raise ConfigError("macvtap needs a network namespace", hint='MacVTap(netns="NAME"), or a path')
    return value


@frozen
class MacVTap(NetworkStrategy):
    """The guest takes the place of a namespace's interfaces, as with :class:`TCFilter`, by a macvtap on each.

    ::

        Sandbox(network=MacVTap(netns="blue"))

    That has the interface's MAC, and the guest its addresses, routes, MTU and permanent neighbours. Meanwhile the
    interface itself has another MAC and no addresses; all of it is put back. No packet passes a place where a policy
    could be kept, and two guests on the same interface reach each other. It takes CAP_NET_ADMIN, CAP_SYS_ADMIN and
    CAP_MKNOD.
    """

    name: ClassVar[str] = "macvtap"

    netns: str | Path = field(default="", converter=_netns)
    interfaces: tuple[str, ...] = field(default=(), converter=interface_names)

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        require("NET_ADMIN", "SYS_ADMIN", "MKNOD")
        async with AsyncExitStack() as stack:
            netns = stack.enter_context(opened(self.netns))
            async with netlink(netns) as kernel:
                found = await endpoints(kernel, netns, self.interfaces)
            taps = [
                await stack.enter_async_context(_on(each, netns, run_dir, link_name(run_dir, f"m{number}")))
                for number, each in enumerate(found)
            ]
            yield Attachment(
                devices=tuple(made.nic(each.link.mac) for made, each in zip(taps, found, strict=True)),
                interfaces=tuple(each.interface() for each in found),
            )


@asynccontextmanager
async def _on(endpoint: Endpoint, netns: Netns, run_dir: Path, name: str) -> AsyncIterator[Tap]:
    """A macvtap in the place of the interface, which steps back."""
    link = endpoint.link
    before = {
        "netns": netns.path, "identity": netns.identity, "name": name, "interface": link.name, "mac": link.mac,
        "addresses": list(endpoint.addresses),
        "routes": [dict(each.raw) for each in endpoint.routes if each.protocol != BY_KERNEL],
    }  # fmt: skip
    async with recorded(run_dir, "macvtap", **before):
        async with netlink(netns) as kernel:
            _switch_ipv6(netns, link.name, off=True)
            for address in endpoint.addresses:
                await kernel.delete_address(link.index, address)
            await kernel.change(link.index, address=_another_mac())
            made = await kernel.add(name, "macvtap", link=link.index, macvtap_mode="bridge", address=link.mac)
            await kernel.up(made.index, mtu=link.mtu)
            _switch_ipv6(netns, name, off=True)
        fd = open_macvtap(netns, name, made.index)
        try:
            yield Tap(name, made.index, fd, netns)
        finally:
            os.close(fd)


async def restore(
    netns: str, identity: str, name: str, interface: str, mac: str, addresses: Sequence[str],
    routes: Sequence[Mapping[str, Any]],
) -> None:  # fmt: skip
    """Remove a macvtap, and give the interface what it had."""
    with suppress(NetworkError), opened(netns) as found:
        if found.identity != identity:
            return
        async with netlink(found) as kernel:
            await kernel.delete_named(name)
            index = (await kernel.link(interface)).index
            await kernel.change(index, address=mac)
            _switch_ipv6(found, interface, off=False)
            for address in addresses:
                await kernel.add_address(index, address)
            for route in sorted(routes, key=lambda each: "gateway" in each):
                with suppress(NetworkError):    # it may depend on one that somebody else has taken away
                    await kernel.add_route(**route)


def _another_mac() -> str:
    return ":".join(f"{each:02x}" for each in (0x02, *os.urandom(5)))


def _switch_ipv6(netns: Netns, name: str, *, off: bool) -> None:
    """Without it the interface would answer for the guest's link-local address, which it has by the same MAC."""
    with inside(netns), suppress(FileNotFoundError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1" if off else "0")
