"""What a policy needs of the kernel beside a tap: devices to look at packets, sockets to send them, the chains."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from pykata.errors import NetworkError, NotPermittedError, ToolFailedError
from pykata.host import find_tool, finish, run_tool
from pykata.net.netlink import Netlink, netlink
from pykata.net.netns import Netns, opened_in, require, socket_in
from pykata.net.policy.chain import MARK, Place, ruleset
from pykata.net.policy.elements import NETLINK_NETFILTER, Elements, delete_table
from pykata.net.tap import Tap, link_name, open_tap

if TYPE_CHECKING:
    from pykata.net.policy.guard import Guarded

QUEUE = 512                 # frames that wait to be looked at


@frozen
class Plumbing:
    """Descriptors and sockets of a policy."""

    inspection: int         # frames of the guest that nobody has decided about
    copies: int             # of frames for the guest
    guest: socket.socket    # sends to the guest
    onward: socket.socket   # sends as if it came from the guest
    elements: Elements


@asynccontextmanager
async def plumbed(tap: Tap, about: Guarded) -> AsyncIterator[Plumbing]:
    """Make all of it; when this yields, the chains are there. Undone in reverse order. Raises HostError."""
    if tap.netns.opener is None:
        require("NET_ADMIN", "NET_RAW")
    nft = find_tool("nft", package="nftables")
    # Further interfaces of a sandbox have taps with other names.
    number = tap.name[-1] if tap.name[-1].isdigit() else ""
    names = {role: link_name(about.run_dir, f"{role}{number}") for role in ("i", "c", "r")}
    place = Place(
        table=table_name(tap.name), tap=tap.name, uplink=about.uplink, inspection=names["i"], copies=names["c"],
        mac=about.mac, addresses=tuple(ipaddress.ip_address(each.partition("/")[0]) for each in about.addresses),
        rate=about.policy.rate, restricts=about.policy.restricts,
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        yield await _made(stack, tap, place, nft, names)


async def _made(
    stack: AsyncExitStack, tap: Tap, place: Place, nft: Path, names: Mapping[str, str]
) -> Plumbing:
    async with netlink(tap.netns) as kernel:
        mtu = (await kernel.link(tap.name)).mtu
        inspection = await _device(stack, kernel, tap.netns, names["i"], mtu)
        copies = await _device(stack, kernel, tap.netns, names["c"], mtu)
        if not place.uplink:
            await _device(stack, kernel, tap.netns, names["r"], mtu)
            await kernel.redirect_out_of((await kernel.link(names["r"])).index, into=tap.index)
        if place.rate is not None and place.rate.bits_per_second is not None:
            stack.push_async_callback(_unshaped, tap)
            await kernel.shape(tap.index, place.rate.bits_per_second)
    guest = stack.enter_context(sender(tap.netns, tap.name))
    onward = stack.enter_context(sender(tap.netns, place.uplink or names["r"]))
    sets = stack.enter_context(socket_in(tap.netns, socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER))
    sets.bind((0, 0))
    stack.callback(delete_table, sets, place.table)
    await _load(nft, tap.netns, place)
    return Plumbing(inspection, copies, guest, onward, Elements(sets, place.table))


def table_name(tap: str) -> str:
    """What nftables' table for a tap is called: it goes with the tap's name, by which ``pykata gc`` finds both."""
    return f"pykata-{tap}"


async def _device(stack: AsyncExitStack, kernel: Netlink, netns: Netns, name: str, mtu: int) -> int:
    """A tap whose other end is us. It goes with its descriptor."""
    fd = open_tap(netns, name, vnet_header=False)
    stack.callback(os.close, fd)
    _quieten(netns, name)
    link = await kernel.link(name)
    await kernel.up(link.index, mtu=mtu, txqlen=QUEUE)
    return fd


async def _unshaped(tap: Tap) -> None:
    async def work() -> None:
        async with netlink(tap.netns) as kernel:
            await kernel.unshape(tap.index)

    await finish(work())


def _quieten(netns: Netns, name: str) -> None:
    """Keep the kernel from saying who it is there, in IPv6: it would look as if the guest did."""
    with suppress(OSError):
        setting = opened_in(netns, Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), os.O_WRONLY | os.O_CLOEXEC)
        with open(setting, "w") as file:
            file.write("1")


def sender(netns: Netns, device: str) -> socket.socket:
    """A socket that sends frames out of a device, with our mark, and receives none (packet(7)). Raises HostError."""
    found = socket_in(netns, socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        found.bind((device, 0))
    except OSError as exc:
        found.close()
        kind = NotPermittedError if isinstance(exc, PermissionError) else NetworkError
        raise kind(f"can't send on {device}: {exc.strerror}") from exc
    return found


async def _load(nft: Path, netns: Netns, place: Place) -> None:
    nsenter = find_tool("nsenter", package="util-linux")
    try:
        await run_tool([nsenter, *netns.way_in, nft, "-f", "-"], input=ruleset(place).encode(), timeout=30)
    except ToolFailedError as exc:
        hint = "it needs nf_tables with the family netdev, for ingress and egress, and its fwd and dup"
        raise NetworkError(f"this kernel doesn't take the rules of a policy: {exc}", hint=hint) from exc
