"""Guests on a bridge: one that exists, or that of a network which pykata owns."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import ClassVar

from attrs import field, frozen

from pykata.errors import ConfigError, NetworkError
from pykata.host import finish, locked
from pykata.net.addresses import checked_addresses, checked_gateway, mac_of
from pykata.net.base import NetworkStrategy, Wanted
from pykata.net.guarding import guarding
from pykata.net.leases import forget_unused, lease
from pykata.net.netlink import Link, Netlink, netlink
from pykata.net.netns import Netns, opened, require
from pykata.net.owned import BRIDGE, Asked, Member, joined, place
from pykata.net.policy.enforce import Tapped
from pykata.net.policy.resolve import servers_of_host
from pykata.net.relay import bound, relayed
from pykata.net.tap import link_name, tap
from pykata.spec import Attachment, Interface, Route

GUEST = "eth0"
CONNECTIONS, MOST_CONNECTIONS = 4096, 1_000_000
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")


def _network(value: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ConfigError(f"network={value!r} is no name of a network", hint="letters, digits, and -_.")
    return value


def _subnet(value: str) -> str:
    try:
        if value and not 8 <= ipaddress.IPv4Network(value).prefixlen <= 28:
            raise ValueError("it must have a prefix of 8 to 28 bits")
    except ValueError as exc:
        raise ConfigError(f"subnet={value!r}: {exc}", hint='such as "10.77.0.0/24"') from exc
    return value


def _connections(value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_CONNECTIONS:
        raise ConfigError(f"connections={value!r} is no limit", hint=f"a whole number from 1 to {MOST_CONNECTIONS}")
    return value


@frozen
class Bridge(NetworkStrategy):
    """A tap that is a port of a bridge.

    ::

        Sandbox(network="bridge")                                       # a network that pykata makes, with NAT
        Sandbox(network=Bridge(network="lab", isolated=True))
        Sandbox(network=Bridge("br0", addresses=["10.0.0.5/24"], gateway="10.0.0.1"))

    Without ``name`` the bridge is that of a network which pykata owns: it is made for the first sandbox in it, and
    removed with the last one, in whatever process. Sandboxes with the same ``network`` reach each other, by their
    ``hostname`` too, unless they are ``isolated``. They get out with the host's address. From outside nobody gets in,
    and they are refused the addresses of this machine unless ``host`` is true. Addresses are given without DHCP, of
    ``subnet`` or of one that is free. With ``ipv6`` they have addresses of a private IPv6 network as well, and get out
    with them if the host forwards IPv6. ``connections`` is how many each of them may have at a time to what is beyond,
    of those that the host has to remember: more are refused.

    With ``name`` it is a bridge that exists, in the namespace ``netns`` (by default our own). The guest has the
    ``addresses`` and the ``gateway`` that are given, else one of the bridge's own network that no other sandbox has.

    It takes CAP_NET_ADMIN and CAP_SYS_ADMIN.
    """

    name: ClassVar[str] = "bridge"
    publishes: ClassVar[bool] = True
    enforces: ClassVar[bool] = True

    bridge: str = field(default="", alias="name")
    addresses: tuple[str, ...] = field(default=(), converter=checked_addresses, kw_only=True)
    gateway: str = field(default="", converter=checked_gateway, kw_only=True)
    netns: str | Path | None = field(default=None, kw_only=True)
    network: str = field(default="default", converter=_network, kw_only=True)
    subnet: str = field(default="", converter=_subnet, kw_only=True)
    ipv6: bool = field(default=False, kw_only=True)
    isolated: bool = field(default=False, kw_only=True)
    host: bool = field(default=False, kw_only=True)
    connections: int = field(default=CONNECTIONS, converter=_connections, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not self.bridge and (self.addresses or self.gateway or self.netns):
            raise ConfigError("addresses, gateway and netns are for a bridge that exists", hint="Bridge(NAME, ...)")
        if self.bridge and (self.subnet or self.ipv6 or self.host or self.network != "default"
                            or self.connections != CONNECTIONS):
            raise ConfigError(f"network, subnet, ipv6, host and connections are for a network of pykata's own, and not "
                              f"for the bridge {self.bridge!r}", hint="leave out one or the other")

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        require("NET_ADMIN", "SYS_ADMIN")
        attached = self._existing(run_dir, wanted) if self.bridge else self._owned(run_dir, wanted)
        async with attached as attachment:
            yield attachment

    @asynccontextmanager
    async def _owned(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        from pykata.net.peers import addresses_of, answering, named

        asked = Asked(subnet=self.subnet, ipv6=self.ipv6, host=self.host, connections=self.connections)

        def known(name: str) -> list[str]:
            return addresses_of(name, member.plan, member.directory)

        async with (
            joined(self.network, asked) as member,
            answering(member) as server,
            self._port(run_dir, wanted, member.netns, BRIDGE, _interface(member), known, member.plan.own,
                       member.plan.neighbours) as made,
        ):
            with named(member, wanted.hostname):
                yield made if made.nameservers else made + Attachment(nameservers=(server,))

    @asynccontextmanager
    async def _existing(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        async with AsyncExitStack() as stack:
            netns = stack.enter_context(opened(self.netns))
            async with netlink(netns) as kernel:
                bridge = await _bridge(kernel, self.bridge)
                own = await kernel.addresses(bridge.index)
            addresses, gateway = self.addresses, self.gateway
            if not addresses:
                network, number = await stack.enter_async_context(_leased(netns, bridge, own))
                addresses = (f"{network.network[number]}/{network.network.prefixlen}",)
                gateway = gateway or str(network.ip)
            routes = (Route("::/0" if ":" in gateway else "0.0.0.0/0", gateway),) if gateway else ()
            interface = Interface(mac_of(addresses[0]), GUEST, mtu=bridge.mtu, addresses=addresses, routes=routes)
            theirs = [each.partition("/")[0] for each in own]
            port = self._port(run_dir, wanted, netns, self.bridge, interface, own=theirs)
            made = await stack.enter_async_context(port)
            servers = tuple(each for each, _ in servers_of_host() if not each.startswith(("127.", "::1")))
            yield made if made.nameservers else made + Attachment(nameservers=servers)

    @asynccontextmanager
    async def _port(
        self, run_dir: Path, wanted: Wanted, netns: Netns, bridge: str, interface: Interface,
        known: Callable[[str], Sequence[str]] = lambda _: (), own: Sequence[str] = (),
        neighbours: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Attachment]:  # fmt: skip
        async with netlink(netns) as kernel:
            master = (await kernel.link(bridge)).index
        name = link_name(run_dir, "t0")
        async with AsyncExitStack() as stack:
            listeners = stack.enter_context(bound(wanted.ports))
            mine = tap(netns, name, mtu=interface.mtu or 1500, master=master, vnet_header=not wanted.restricts)
            made = await stack.enter_async_context(mine)
            if self.isolated:
                async with netlink(netns) as kernel:
                    await kernel.isolate(made.index)
            gateways = [each.gateway for each in interface.routes if each.gateway]
            tapped = Tapped(
                made, interface.mac, interface.addresses, own=own, gateways=gateways, neighbours=neighbours or {}
            )
            kept = await stack.enter_async_context(guarding(run_dir, [tapped], wanted, known=known))
            # From where the bridge is, which has an address in the guest's network.
            published = await stack.enter_async_context(relayed(listeners, netns, interface.addresses))
            yield kept + Attachment(
                devices=(made.nic(interface.mac),), interfaces=(interface,), published=published
            )  # fmt: skip


def _interface(member: Member) -> Interface:
    plan, number = member.plan, member.number
    address = plan.address(number)
    return Interface(
        mac_of(address), GUEST, addresses=(address, *([plan.address6(number)] if plan.subnet6 else [])),
        routes=(Route("0.0.0.0/0", plan.gateway), *([Route("::/0", plan.gateway6)] if plan.subnet6 else [])),
    )  # fmt: skip


async def _bridge(kernel: Netlink, name: str) -> Link:
    found = await kernel.link(name)
    if found.kind != "bridge":
        raise NetworkError(f"the interface {name!r} is no bridge, but {found.kind or 'a device'}")
    if not found.is_up:
        raise NetworkError(f"the bridge {name!r} is down", hint=f"ip link set {name} up")
    return found


@asynccontextmanager
async def _leased(
    netns: Netns, bridge: Link, own: Sequence[str]
) -> AsyncIterator[tuple[ipaddress.IPv4Interface, int]]:
    """A number of the bridge's own IPv4 network that no other sandbox has."""
    fours = [ipaddress.IPv4Interface(each) for each in own if ":" not in each]
    if not fours or fours[0].network.prefixlen > 29:
        raise NetworkError(f"the bridge {bridge.name!r} has no IPv4 network to take an address of",
                           hint='Bridge(NAME, addresses=["10.0.0.5/24"], gateway=...)')
    file = place() / f".{netns.identity}-{bridge.index}"
    free = [each for each in range(2, min(fours[0].network.num_addresses - 1, 1 << 16))
            if fours[0].network[each] != fours[0].ip]
    lock = file.with_name(f"{file.name}.lock")
    try:
        with ExitStack() as stack:
            async with locked(lock):
                taking = lease(file, free, what=f"the bridge {bridge.name!r} ({fours[0].network})")
                number = stack.enter_context(taking)
            yield fours[0], number
    finally:
        await finish(_without_file(file, lock))


async def _without_file(file: Path, lock: Path) -> None:
    async with locked(lock):
        forget_unused(file)
