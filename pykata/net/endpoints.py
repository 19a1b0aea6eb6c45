"""What there is in a network namespace that a guest can take the place of."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from attrs import frozen

from pykata.errors import NetworkError
from pykata.net.netlink import BY_ADVERTISEMENT, BY_KERNEL, Link, LinkRoute, Netlink
from pykata.net.netns import Netns
from pykata.spec import Interface, Route


@frozen
class Endpoint:
    """An interface of a namespace, with all that its guest is given."""

    link: Link
    addresses: tuple[str, ...]
    routes: tuple[LinkRoute, ...]
    neighbours: tuple[tuple[str, str], ...]

    def interface(self) -> Interface:
        """The same interface in the guest, whose kernel makes the routes to its own networks."""
        routes = [
            Route(each.destination, each.gateway)
            for each in self.routes if each.protocol not in (BY_KERNEL, BY_ADVERTISEMENT)
        ]  # fmt: skip
        return Interface(
            self.link.mac, self.link.name, mtu=self.link.mtu, addresses=self.addresses,
            routes=(*on_the_way(self.addresses, routes), *routes), neighbours=self.neighbours,
        )  # fmt: skip


def on_the_way(addresses: Sequence[str], routes: Sequence[Route]) -> list[Route]:
    """Routes to gateways that are on the link though no address or route says so ("onlink", in ip-route(8))."""
    known = [ipaddress.ip_interface(each).network for each in addresses]
    known += [ipaddress.ip_network(each.destination, strict=False) for each in routes if not each.gateway]
    gateways = {ipaddress.ip_address(each.gateway) for each in routes if each.gateway}
    far = [each for each in gateways if not each.is_link_local or each.version == 4]
    return [
        Route(f"{each}/{each.max_prefixlen}")
        for each in sorted(far, key=str)
        if not any(each.version == network.version and each in network for network in known)
    ]


async def endpoints(kernel: Netlink, netns: Netns, names: Sequence[str] = ()) -> list[Endpoint]:
    """Those of these names, or all that are up, of Ethernet, and have an address. Raises NetworkError if there is none.
    """
    links = [await kernel.link(name) for name in names] if names else await kernel.links()
    found, refused = [], []
    for link in links:
        if link.is_loopback and not names:
            continue
        endpoint = await _endpoint(kernel, link)
        if why := _why_not(endpoint):
            refused.append(f"{link.name} {why}")
        else:
            found.append(endpoint)
    if not found or (names and refused):
        listed = "; ".join(refused) or "it has none but the loopback"
        raise NetworkError(f"no interface of {netns.path} can be given to a guest: {listed}")
    macs = [each.link.mac for each in found]
    if len(set(macs)) < len(macs):
        raise NetworkError(f"interfaces of {netns.path} share a MAC address: {', '.join(macs)}",
                           hint="name the one to use with interfaces=")
    return found


async def _endpoint(kernel: Netlink, link: Link) -> Endpoint:
    return Endpoint(
        link,
        tuple(await kernel.addresses(link.index)),
        tuple(await kernel.routes(link.index)),
        tuple(await kernel.neighbours(link.index)),
    )


def _why_not(endpoint: Endpoint) -> str:
    link = endpoint.link
    if link.is_loopback:
        return "is the loopback"
    if len(link.mac) != len("00:00:00:00:00:00"):
        return "is no Ethernet interface"
    if link.name.startswith("pk") and link.kind == "tun":
        return "is another sandbox's"
    if not link.is_up:
        return "is down"
    return "" if endpoint.addresses else "has no address"
