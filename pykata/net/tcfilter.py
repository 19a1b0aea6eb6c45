"""A guest in the place of a network namespace's interfaces: Kata's usual model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import ClassVar

from attrs import field, frozen

from pykata.errors import ConfigError, NetworkError
from pykata.host import locked, run_root
from pykata.net.base import NetworkStrategy, Wanted
from pykata.net.endpoints import Endpoint, endpoints
from pykata.net.guarding import guarding
from pykata.net.leftovers import recorded
from pykata.net.netlink import Netlink, netlink
from pykata.net.netns import Netns, opened, require
from pykata.net.policy.enforce import Tapped
from pykata.net.relay import bound, relayed
from pykata.net.tap import Tap, link_name, tap
from pykata.spec import Attachment

PRIORITY = 0x706B
"""Of our filters, by which they are told from others."""


def _netns(value: str | Path | None) -> str | Path:
    if not value:
        raise ConfigError("tcfilter needs a network namespace", hint='TCFilter(netns="NAME"), or a path')
    return value


def interface_names(value: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Names of interfaces as an argument. Raises ConfigError."""
    if isinstance(value, str) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"interfaces={value!r} is not a list of names", hint='such as ["eth0"]')
    return tuple(value)


@frozen
class TCFilter(NetworkStrategy):
    """The guest takes the place of the interfaces in a network namespace: Docker's, that of a CNI, or any other.

    ::

        Sandbox(network=TCFilter(netns="blue"))                 # as "ip netns" calls it
        Sandbox(network=TCFilter(netns="/proc/4242/ns/net"))

    Each interface that is up and has an address gets a tap beside it, and what comes in at one goes out of the other.
    The guest has the interface's name, addresses, routes, MTU, MAC and permanent neighbours. Meanwhile nobody else in
    the namespace receives anything through them. ``interfaces`` are those to take; empty means all but the loopback.
    Published ports are connected from where this program is, which needs a way to the guest's address.
    It takes CAP_NET_ADMIN and CAP_SYS_ADMIN.
    """

    name: ClassVar[str] = "tcfilter"
    publishes: ClassVar[bool] = True
    enforces: ClassVar[bool] = True

    netns: str | Path = field(default="", converter=_netns)
    interfaces: tuple[str, ...] = field(default=(), converter=interface_names)

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        require("NET_ADMIN", "SYS_ADMIN")
        with opened(self.netns) as netns, opened() as ours, bound(wanted.ports) as listeners:
            async with redirected(netns, run_dir, wanted, self.interfaces) as attachment:
                addresses = [each for one in attachment.interfaces for each in one.addresses]
                # From our own namespace: in the guest's, its address would be our own.
                async with relayed(listeners, ours, addresses) as published:
                    yield attachment + Attachment(published=published)


@asynccontextmanager
async def redirected(
    netns: Netns, run_dir: Path, wanted: Wanted, names: tuple[str, ...] = ()
) -> AsyncIterator[Attachment]:
    """A guest's end of each interface of the namespace, or of those with these names."""
    async with AsyncExitStack() as stack:
        # Two sandboxes that look at the same time would both find it free.
        async with netlink(netns) as kernel, locked(run_root() / f".netns-{netns.identity}"):
            found = await endpoints(kernel, netns, names)
            taps = []
            for number, each in enumerate(found):
                await _check_free(kernel, each)
                name = link_name(run_dir, f"t{number}")
                beside = tap(netns, name, mtu=each.link.mtu, vnet_header=not wanted.restricts)
                taps.append(await stack.enter_async_context(beside))
            both = list(zip(taps, found, strict=True))
            tapped = [_tapped(made, one) for made, one in both]
            kept = await stack.enter_async_context(guarding(run_dir, tapped, wanted))
            for made, one in both:
                await stack.enter_async_context(_between(kernel, one, made, run_dir, guarded=bool(kept.guards)))
        yield kept + Attachment(
            devices=tuple(made.nic(one.link.mac) for made, one in both),
            interfaces=tuple(one.interface() for one in found),
        )


def _tapped(made: Tap, endpoint: Endpoint) -> Tapped:
    gateways = tuple(each.gateway for each in endpoint.routes if each.gateway)
    return Tapped(
        made, endpoint.link.mac, endpoint.addresses, endpoint.link.name, gateways=gateways,
        neighbours=dict(endpoint.neighbours),
    )  # fmt: skip


async def _check_free(kernel: Netlink, endpoint: Endpoint) -> None:
    """Raise NetworkError if another sandbox has the interface; clean up after one that was killed."""
    index = endpoint.link.index
    if PRIORITY not in await kernel.filter_priorities(index):
        return
    if any(each.kind == "tun" and each.name.startswith("pk") for each in await kernel.links()):
        raise NetworkError(f"another sandbox has the interface {endpoint.link.name}",
                           hint="one namespace is for one sandbox at a time")
    await kernel.delete_filters(index, priority=PRIORITY)


@asynccontextmanager
async def _between(
    kernel: Netlink, endpoint: Endpoint, made: Tap, run_dir: Path, *, guarded: bool
) -> AsyncIterator[None]:
    """What comes in at one goes out of the other. With a policy that is the guard's: it only says whose this is."""
    link, netns = endpoint.link, made.netns
    had_ingress = bool({"ingress", "clsact"} & set(await kernel.qdiscs(link.index)))
    async with recorded(
        run_dir, "redirection", netns=netns.path, identity=netns.identity, index=link.index, keep=had_ingress
    ):
        await kernel.add_ingress(link.index)
        if guarded:
            await kernel.reserve(link.index, priority=PRIORITY)
        else:
            await kernel.add_ingress(made.index)
            await kernel.redirect(link.index, made.index, priority=PRIORITY)
            await kernel.redirect(made.index, link.index, priority=PRIORITY)
        yield


async def restore(netns: str, identity: str, index: int, keep: bool) -> None:
    """Take our filter from an interface, and the discipline that it needed unless that is to ``keep``."""
    with suppress(NetworkError), opened(netns) as found:
        if found.identity != identity:
            return      # another namespace has its name by now
        async with netlink(found) as kernel:
            await kernel.delete_filters(index, priority=PRIORITY)
            if not keep:
                await kernel.delete_ingress(index)
