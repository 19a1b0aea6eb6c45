"""Links, addresses, routes and traffic control of a namespace, by pyroute2 (rtnetlink(7)), whose import takes 0.1 s."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from attrs import frozen

from pykata.errors import NetworkError, NotPermittedError
from pykata.net.netns import Netns, socket_in

IFF_UP, IFF_LOOPBACK = 1, 8
MAIN_TABLE = 254
NUD_PERMANENT = 0x80
LINK_LOCAL_SCOPE = 253
BY_KERNEL, BY_ADVERTISEMENT = 2, 9
"""Origins of routes (rtnetlink(7), rtm_protocol) that the guest's kernel makes itself."""

INGRESS = 0xFFFF0000        # the handle of an ingress queueing discipline (tc(8))
FILTERS_OF_INGRESS = 0xFFFFFFF2     # where filters of a clsact discipline see what comes in
ROOT = 0xFFFFFFFF           # TC_H_ROOT
FILTERS_OF_EGRESS = 0xFFFFFFF3
ETH_P_ALL = 3
GONE = (errno.ENODEV, errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL)


@frozen
class Link:
    """An interface."""

    index: int
    name: str
    mac: str
    mtu: int
    kind: str
    flags: int
    master: int         # the index of the bridge that it is a port of, or 0

    @property
    def is_up(self) -> bool:
        return bool(self.flags & IFF_UP)

    @property
    def is_loopback(self) -> bool:
        return bool(self.flags & IFF_LOOPBACK)


@frozen
class LinkRoute:
    """A route of the main table; an empty ``gateway`` means on link. ``raw`` is what makes the same one again."""

    destination: str
    gateway: str
    protocol: int
    raw: Mapping[str, Any]


@asynccontextmanager
async def netlink(netns: Netns) -> AsyncIterator[Netlink]:
    """A connection to the kernel about what is in the namespace. Raises NotPermittedError."""
    from pyroute2 import AsyncIPRoute

    with socket_in(netns, socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        try:
            async with AsyncIPRoute(use_socket=connection) as route:
                yield Netlink(route, netns)
        finally:
            await asyncio.sleep(0)      # the loop lets go of the socket in its next turn


class Netlink:
    """What we ask of a namespace. Each call raises NetworkError, or NotPermittedError."""

    def __init__(self, route: Any, netns: Netns) -> None:
        self._route = route
        self._netns = netns

    # --- links ---

    async def links(self) -> list[Link]:
        with _explained("list interfaces"):
            return [_link(each) async for each in await self._route.link("dump")]

    async def link(self, name: str) -> Link:
        """The interface of this name."""
        found = [each for each in await self.links() if each.name == name]
        if not found:
            known = ", ".join(each.name for each in await self.links())
            raise NetworkError(f"there is no interface {name!r} in {self._netns.path}", hint=f"it has {known}")
        return found[0]

    async def add(self, name: str, kind: str, **options: Any) -> Link:
        """A new interface, not switched on."""
        with _explained(f"make the {kind} interface {name}"):
            await self._route.link("add", ifname=name, kind=kind, **options)
        return await self.link(name)

    async def change(self, index: int, **options: Any) -> None:
        """Change a link: ``state``, ``mtu``, ``address``, ``master``, ``net_ns_fd`` and what else pyroute2 knows."""
        with _explained(f"change interface {index}: {options}"):
            await self._route.link("set", index=index, **options)

    async def up(self, index: int, **options: Any) -> None:
        await self.change(index, state="up", **options)

    async def delete(self, index: int) -> None:
        """Remove a link, if it is there."""
        with _explained(f"remove interface {index}", unless=GONE):
            await self._route.link("del", index=index)

    async def delete_named(self, name: str) -> None:
        """Remove a link, if there is one of this name."""
        for each in await self.links():
            if each.name == name:
                await self.delete(each.index)

    async def isolate(self, index: int) -> None:
        """A port of a bridge is cut off from the other ports that are isolated (bridge(8))."""
        with _explained(f"isolate bridge port {index}"):
            await self._route.brport("set", index=index, isolated=1)

    # --- addresses, routes, neighbours ---

    async def addresses(self, index: int) -> list[str]:
        """Those of an interface as "10.0.0.2/24", without link-local ones of IPv6."""
        with _explained("list addresses"):
            return [
                f"{each.get('IFA_LOCAL') or each.get('IFA_ADDRESS')}/{each['prefixlen']}"
                async for each in await self._route.addr("dump", index=index)
                if each["index"] == index and each["scope"] != LINK_LOCAL_SCOPE
            ]

    async def add_address(self, index: int, address: str) -> None:
        """Nobody is asked whether it is taken; it is there already: so be it."""
        about = ipaddress.ip_interface(address)
        extra: dict[str, Any] = {"IFA_FLAGS": 2} if about.version == 6 else {}     # IFA_F_NODAD
        if about.version == 4 and about.network.prefixlen < 31:
            extra["broadcast"] = str(about.network.broadcast_address)
        extra.update(address=str(about.ip), prefixlen=about.network.prefixlen)
        with _explained(f"give the address {address}", unless=(errno.EEXIST,)):
            await self._route.addr("add", index=index, **extra)

    async def delete_address(self, index: int, address: str) -> None:
        about = ipaddress.ip_interface(address)
        with _explained(f"take the address {address} away", unless=GONE):
            await self._route.addr("del", index=index, address=str(about.ip), prefixlen=about.network.prefixlen)

    async def routes(self, index: int | None = None) -> list[LinkRoute]:
        """Unicast routes of the main table, those through one interface if it is given."""
        found = []
        with _explained("list routes"):
            for family in (socket.AF_INET, socket.AF_INET6):
                async for each in await self._route.route("dump", family=family, table=MAIN_TABLE):
                    if each["type"] == 1 and (index is None or each.get("RTA_OIF") == index):
                        found.append(_route(each))
        return [each for each in found if not each.destination.startswith(("fe80:", "ff"))]

    async def add_route(self, **raw: Any) -> None:
        """A route as pyroute2 takes it, or the ``raw`` of a :class:`LinkRoute`."""
        with _explained(f"add the route to {raw.get('dst')}", unless=(errno.EEXIST,)):
            await self._route.route("add", **raw)

    async def neighbours(self, index: int) -> list[tuple[str, str]]:
        """Permanent ones of an interface: IP address and MAC."""
        with _explained("list neighbours"):
            return [
                (each.get("NDA_DST"), each.get("NDA_LLADDR"))
                async for each in await self._route.neigh("dump", ifindex=index)
                if each["ifindex"] == index and each["state"] & NUD_PERMANENT
                and each.get("NDA_DST") and each.get("NDA_LLADDR")
            ]  # fmt: skip

    # --- traffic control ---

    async def qdiscs(self, index: int) -> list[str]:
        """The kinds of an interface's queueing disciplines."""
        with _explained("list queueing disciplines"):
            found = await self._route.get_qdiscs(index)
            return [each.get("TCA_KIND") async for each in found if each["index"] == index]

    async def add_ingress(self, index: int) -> bool:
        """Have incoming packets of the interface pass filters; False if they did before."""
        if {"ingress", "clsact"} & set(await self.qdiscs(index)):
            return False
        with _explained(f"add an ingress discipline to interface {index}"):
            await self._route.tc("add", "ingress", index, INGRESS)
        return True

    async def delete_ingress(self, index: int) -> None:
        with _explained(f"remove the ingress discipline of interface {index}", unless=(*GONE, errno.EINVAL)):
            await self._route.tc("del", "ingress", index, INGRESS)

    async def filter_priorities(self, index: int) -> list[int]:
        """Those of the filters for incoming packets."""
        with _explained("list filters"):
            found = await self._route.get_filters(index, parent=FILTERS_OF_INGRESS)
            return [each["info"] >> 16 async for each in found]

    async def redirect(self, index: int, to: int, *, priority: int) -> None:
        """All that comes in at one interface goes out of the other one: a filter of both disciplines for ingress."""
        action = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": to}
        with _explained(f"redirect from interface {index} to {to}"):
            # Without a target the kernel takes the filter and never looks at it.
            await self._route.tc("add-filter", "u32", index, parent=FILTERS_OF_INGRESS, prio=priority,
                                 protocol=ETH_P_ALL, target=0x10000, keys=["0x0/0x0+0"], action=action)

    async def reserve(self, index: int, *, priority: int) -> None:
        """A filter that does nothing, and is there to be seen. The interface must have a discipline for ingress."""
        with _explained(f"add a filter to interface {index}"):
            await self._route.tc("add-filter", "u32", index, parent=FILTERS_OF_INGRESS, prio=priority,
                                 protocol=ETH_P_ALL, target=0x10000, keys=["0x0/0x0+0"])

    async def redirect_out_of(self, index: int, into: int) -> None:
        """All that is sent out of one interface comes in at the other one."""
        action = {"kind": "mirred", "direction": "ingress", "action": "redirect", "ifindex": into}
        with _explained(f"redirect what interface {index} sends into {into}"):
            await self._route.tc("add", "clsact", index)
            await self._route.tc("add-filter", "u32", index, parent=FILTERS_OF_EGRESS, prio=1, protocol=ETH_P_ALL,
                                 target=0x10000, keys=["0x0/0x0+0"], action=action)

    async def shape(self, index: int, bits_per_second: int) -> None:
        """Send no more than that out of the interface, and keep up to 50 ms of what waits (tc-tbf(8))."""
        burst = max(bits_per_second // 80, 64 * 1024)
        with _explained(f"limit interface {index} to {bits_per_second} bit/s"):
            await self._route.tc("add", "tbf", index, 0x10000, rate=f"{bits_per_second}bit", burst=burst,
                                 latency="50ms")

    async def unshape(self, index: int) -> None:
        """Undo :meth:`shape`, if it was done."""
        with _explained(f"remove the limit of interface {index}", unless=(*GONE, errno.EINVAL)):
            await self._route.tc("del", None, index, 0x10000, parent=ROOT)

    async def delete_filters(self, index: int, *, priority: int) -> None:
        with _explained(f"remove the redirection of interface {index}", unless=(*GONE, errno.EINVAL)):
            # struct tcmsg, tcm_info. A library that isn't told the kind leaves it to us, and without it all would go.
            info = priority << 16 | socket.htons(ETH_P_ALL)
            await self._route.tc("del-filter", None, index, parent=FILTERS_OF_INGRESS, info=info)


def _link(message: Any) -> Link:
    info = message.get("IFLA_LINKINFO")
    return Link(
        index=message["index"], name=message.get("IFLA_IFNAME"), mac=message.get("IFLA_ADDRESS") or "",
        mtu=message.get("IFLA_MTU") or 0, kind=(info.get("IFLA_INFO_KIND") if info else "") or "",
        flags=message["flags"], master=message.get("IFLA_MASTER") or 0,
    )  # fmt: skip


def _route(message: Any) -> LinkRoute:
    everywhere = "::" if message["family"] == socket.AF_INET6 else "0.0.0.0"  # noqa: S104
    destination = f"{message.get('RTA_DST') or everywhere}/{message['dst_len']}"
    raw = {
        "dst": destination, "oif": message.get("RTA_OIF"), "gateway": message.get("RTA_GATEWAY"),
        "prefsrc": message.get("RTA_PREFSRC"), "priority": message.get("RTA_PRIORITY"), "proto": message["proto"],
        "scope": message["scope"], "flags": message["flags"] & 4, "family": message["family"],      # RTNH_F_ONLINK
    }  # fmt: skip
    raw = {name: value for name, value in raw.items() if value is not None}
    return LinkRoute(destination, message.get("RTA_GATEWAY") or "", message["proto"], raw)


@contextmanager
def _explained(what: str, unless: tuple[int, ...] = ()) -> Iterator[None]:
    """The kernel's refusal as an error of ours; ``unless`` are the errnos that don't matter."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as exc:
        if exc.code in unless:
            return
        if exc.code in (errno.EPERM, errno.EACCES):
            raise NotPermittedError(f"can't {what}: {exc.args[1]}", hint="it takes CAP_NET_ADMIN") from exc
        raise NetworkError(f"can't {what}: {exc.args[1]}") from exc
