"""A network that pykata owns: a bridge in a namespace of its own, which the host routes to and translates.

It belongs to all sandboxes of this user that are in it, in whatever process. The first makes it, the last removes it;
what a killed one leaves is removed by ``pykata gc``. Its directory has the record of what was made, the namespace, and
the file by which addresses are shared out.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from attrs import asdict, evolve, frozen

from pykata.errors import NetworkError, PykataError
from pykata.host import finish, locked, run_root
from pykata.net import nat
from pykata.net.addresses import mac_of
from pykata.net.leases import held, lease
from pykata.net.netlink import Netlink, netlink
from pykata.net.netns import Netns, inside, opened, pinned, unpin

BRIDGE, UPLINK = "bridge", "uplink"
POOL = IPv4Network("10.89.0.0/16")
SIZE = 23               # of a network from the pool: 254 sandboxes
PLACE = ".networks"     # below the run directories' root


@frozen(kw_only=True)
class Asked:
    """What somebody wants of a network: all who are in it the same. ``subnet`` may be empty: any."""

    subnet: str
    ipv6: bool
    host: bool
    connections: int


@frozen
class Plan:
    """What a network is made of. ``subnet6`` is empty without IPv6."""

    name: str
    subnet: str
    subnet6: str
    host: bool          # its guests may reach the addresses of this machine
    link: str           # the host's end
    connections: int    # of each guest, that the host remembers at a time

    @property
    def network(self) -> IPv4Network:
        return IPv4Network(self.subnet)

    @property
    def gateway(self) -> str:
        return str(self.network[1])

    def address(self, number: int) -> str:
        return f"{self.network[number]}/{self.network.prefixlen}"

    def resolver(self, number: int) -> str:
        """The name server of the guest with this number: the upper half of the network is theirs."""
        return str(self.network[number + self.network.num_addresses // 2])

    @property
    def own(self) -> tuple[str, ...]:
        """Addresses that are no guest's: the gateway's, those of name servers, the host's end."""
        upper = list(self.network.subnets())[1]
        return (self.gateway, str(upper), *([self.gateway6] if self.subnet6 else []))

    @property
    def neighbours(self) -> dict[str, str]:
        """MACs that every guest may know: no other guest can say that they are its own."""
        mac = mac_of(self.gateway)
        return {self.gateway: mac, **({self.gateway6: mac} if self.subnet6 else {})}

    @property
    def gateway6(self) -> str:
        return str(IPv6Network(self.subnet6)[1])

    def address6(self, number: int) -> str:
        network = IPv6Network(self.subnet6)
        return f"{network[number]}/{network.prefixlen}"

    @property
    def numbers(self) -> range:
        """Of the guests; 1 is the gateway."""
        return range(2, self.network.num_addresses // 2 - 1)


@frozen
class Member:
    """A sandbox's place in a network."""

    plan: Plan
    directory: Path
    number: int
    netns: Netns


@asynccontextmanager
async def joined(name: str, asked: Asked) -> AsyncIterator[Member]:
    """A place in the network of this name, which is made if it isn't there. Raises NetworkError."""
    directory = place() / name
    async with _place(directory, asked) as (plan, number):
        with opened(directory / "net") as netns:
            yield Member(plan, directory, number, netns)


@asynccontextmanager
async def _place(directory: Path, asked: Asked) -> AsyncIterator[tuple[Plan, int]]:
    lock = directory.with_name(f".{directory.name}.lock")
    try:
        with ExitStack() as stack:
            async with locked(lock):
                plan = await _plan(directory, asked)
                what = f"the network {directory.name!r} ({plan.subnet})"
                number = stack.enter_context(lease(directory / "leases", plan.numbers, what=what))
            yield plan, number
    finally:
        await finish(_remove_unused(directory, lock))


def place() -> Path:
    """The directory of all networks."""
    path = run_root() / PLACE
    path.mkdir(mode=0o700, exist_ok=True)
    return path


async def _plan(directory: Path, asked: Asked) -> Plan:
    """That of the network as it is, or of the one that is made now."""
    if not held(directory / "leases"):
        await _remove(directory)        # it may be half of one, if who made it was killed
        plan = await _new(directory.name, asked)
        _write(plan, directory)
        await _make(plan, directory)
    plan = _read(directory)
    there = Asked(subnet=plan.subnet, ipv6=bool(plan.subnet6), host=plan.host, connections=plan.connections)
    if evolve(asked, subnet=asked.subnet or plan.subnet) != there:
        raise NetworkError(
            f"there is a network {plan.name!r} with other options: {plan.subnet}, ipv6={there.ipv6}, "
            f"host={there.host}, connections={there.connections}", hint="use its options, or another name",
        )  # fmt: skip
    return plan


def _write(plan: Plan, directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / "network.json").write_text(json.dumps(asdict(plan)))


def _read(directory: Path) -> Plan:
    return Plan(**json.loads((directory / "network.json").read_text()))


async def _new(name: str, asked: Asked) -> Plan:
    digest = hashlib.sha256(f"{run_root()}/{name}".encode()).hexdigest()
    with opened() as ours:
        async with netlink(ours) as kernel:
            routes = await kernel.routes()
    used = [ipaddress.ip_network(each.destination, strict=False) for each in routes]
    used = [each for each in used if each.version == 4 and each.prefixlen]
    chosen = asked.subnet or next((str(each) for each in POOL.subnets(new_prefix=SIZE)
                             if not any(each.overlaps(other) for other in used)), "")
    if not chosen or any(IPv4Network(chosen).overlaps(other) for other in used):
        raise NetworkError(f"{chosen or POOL} is in use: the host has a route into it", hint="choose another subnet=")
    six = f"fd{digest[:2]}:{digest[2:6]}:{digest[6:10]}::/64" if asked.ipv6 else ""
    return Plan(name, chosen, six, asked.host, f"pk{digest[:11]}", asked.connections)


async def _make(plan: Plan, directory: Path) -> None:
    try:
        await pinned(directory / "net")
        with opened(directory / "net") as netns, opened() as ours:
            async with netlink(netns) as within, netlink(ours) as kernel:
                # Else it has the lowest MAC of its ports, another one whenever a guest comes or goes, and those that
                # stay ask the old one until they notice.
                bridge = await within.add(BRIDGE, "bridge", address=mac_of(plan.gateway))
                far = await kernel.add(plan.link, "veth", peer={"ifname": UPLINK, "net_ns_fd": netns.fd})
                near = await within.link(UPLINK)
                _set(netns, "1", "ipv4/ip_forward", "ipv6/conf/all/forwarding")
                # The host has an address of the network, and is not on the bridge.
                _set(netns, "1", f"ipv4/conf/{BRIDGE}/proxy_arp")
                # What goes from port to port isn't forwarded: rules about that aren't asked.
                _set(netns, "0", "bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables")
                for index in (bridge.index, near.index):
                    await within.up(index)
                await kernel.up(far.index, ifalias=str(directory))      # whose it is, for people and for tests
                await _address(within, kernel, plan, (bridge.index, near.index, far.index))
            await nat.load_inner(netns, plan)
        await nat.load_outer(plan, directory.parent)
    except BaseException:
        await finish(_remove(directory))
        raise


async def _address(within: Netlink, kernel: Netlink, plan: Plan, indices: tuple[int, int, int]) -> None:
    bridge, near, far = indices
    await within.add_address(bridge, f"{plan.gateway}/{plan.network.prefixlen}")
    # The way to the host needs no addresses of its own: the gateway's serves on both sides, and link-local ones.
    last = plan.network[-2]
    await kernel.add_address(far, f"{last}/32")
    await within.add_route(dst=f"{last}/32", oif=near, scope=253)
    await within.add_route(dst="0.0.0.0/0", gateway=str(last), oif=near)
    await kernel.add_route(dst=f"{plan.gateway}/32", oif=far, scope=253)
    await kernel.add_route(dst=plan.subnet, gateway=plan.gateway, oif=far)
    if plan.subnet6:
        await within.add_address(bridge, f"{plan.gateway6}/64")


def _set(netns: Netns, value: str, *switches: str) -> None:
    with inside(netns):
        for each in switches:
            with suppress(FileNotFoundError):
                Path("/proc/sys/net", each).write_text(value)


async def _remove_unused(directory: Path, lock: Path) -> None:
    async with locked(lock):
        if not held(directory / "leases"):
            await _remove(directory)


async def _remove(directory: Path) -> None:
    """Take the network down, as far as it is there."""
    with suppress(OSError, ValueError, TypeError):
        plan = _read(directory)
        with opened() as ours, suppress(PykataError):
            async with netlink(ours) as kernel:
                await kernel.delete_named(plan.link)
        with suppress(PykataError):
            await nat.unload_outer(plan, directory.parent)
    unpin(directory / "net")
    shutil.rmtree(directory, ignore_errors=True)


def _unused() -> list[Path]:
    found = run_root() / PLACE
    every = sorted(found.iterdir()) if found.is_dir() else []
    return [each for each in every if each.is_dir() and not held(each / "leases")]


async def collect() -> list[Path]:
    """Remove networks that nobody uses any more: who was in them was killed."""
    removed = _unused()
    for directory in removed:
        await _remove_unused(directory, directory.with_name(f".{directory.name}.lock"))
    return removed
