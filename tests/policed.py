"""Strategies with a policy, each with a world of its own and somebody beside the guest."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import anyio
from attrs import field, frozen

from pykata import CNI, Bridge, NetworkStrategy, TCFilter, UserNetwork
from pykata.net.base import Wanted
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, socket_in
from tests.cni_chain import chain
from tests.host.stand_in import stand_in
from tests.netlab import (
    GATEWAY,
    GATEWAY6,
    GOOD6,
    GUEST,
    GUEST6,
    HOST,
    NEIGHBOUR,
    Resolver,
    World,
    neighbourhood,
    surroundings,
)

RESOLVER = ("127.83.7.53", 53)


@frozen(kw_only=True)
class Policed:
    """A strategy, what is around its guest, and what came to the neighbour, if that is a real one."""

    strategy: NetworkStrategy
    world: World
    resolver: Resolver
    gateway: str = GATEWAY
    gateway6: str = GATEWAY6
    neighbour: str = NEIGHBOUR
    neighbour6: str = "fd81:7::3"
    six: str = GOOD6            # an address of IPv6 beyond, which the guest has a route to
    own: tuple[tuple[str, int], ...] = ()       # of the host, and of what connects the guest
    visits: list[object] = field(factory=list)


@asynccontextmanager
async def tcfilter(path: Path) -> AsyncIterator[Policed]:
    async with surroundings(path, RESOLVER) as (inside, world, resolver):
        yield Policed(strategy=TCFilter(inside.path), world=world, resolver=resolver)


@asynccontextmanager
async def bridge(path: Path) -> AsyncIterator[Policed]:
    """One that exists, with the world and a neighbour on it."""
    async with surroundings(path, RESOLVER) as (inside, world, resolver):
        async with netlink(inside) as kernel:
            eth0 = await kernel.link("eth0")
            for address in await kernel.addresses(eth0.index):
                await kernel.delete_address(eth0.index, address)
            switch = await kernel.add("br0", "bridge")
            await kernel.change(eth0.index, master=switch.index)
            await kernel.up(switch.index)
        near = Bridge("br0", addresses=["10.81.7.77/24", "fd81:7::77/64"], netns=inside.path)
        async with _beside(path, near) as (address, visits):
            strategy = Bridge("br0", addresses=[f"{GUEST}/24", f"{GUEST6}/64"], gateway=GATEWAY, netns=inside.path)
            yield Policed(strategy=strategy, world=world, resolver=resolver, neighbour=address, six=GATEWAY6,
                          visits=visits)


@asynccontextmanager
async def owned(path: Path) -> AsyncIterator[Policed]:
    """A network of pykata's own, with a neighbour in it."""
    strategy = Bridge(network="policed", subnet="10.89.0.0/24", ipv6=True)
    async with neighbourhood(path, RESOLVER) as (_, world, resolver), _beside(path, strategy) as (address, visits):
        yield Policed(strategy=strategy, world=world, resolver=resolver, gateway="10.89.0.1", gateway6="fd00::1",
                      neighbour=address, neighbour6="fd00::9", visits=visits,
                      own=((HOST, 8080), ("10.89.0.254", 8080), ("10.89.0.130", 8080)))


@asynccontextmanager
async def user(path: Path) -> AsyncIterator[Policed]:
    async with neighbourhood(path, RESOLVER) as (_, world, resolver):
        yield Policed(strategy=UserNetwork("slirp4netns", ipv6=True), world=world, resolver=resolver,
                      gateway="10.0.2.2", gateway6="fd00:0:0:2::2", neighbour="10.0.4.15", neighbour6="fd00:0:0:2::16",
                      own=((HOST, 8080), ("10.0.3.1", 8080), ("10.0.3.2", 8080), ("10.0.3.3", 8080)))


@asynccontextmanager
async def cni(path: Path) -> AsyncIterator[Policed]:
    strategy = CNI(chain(path, six=True))
    async with neighbourhood(path, RESOLVER) as (_, world, resolver), _beside(path, strategy) as (address, visits):
        yield Policed(strategy=strategy, world=world, resolver=resolver, gateway="10.66.0.1", gateway6="fd66::1",
                      neighbour=address, neighbour6="fd66::77", visits=visits, own=((HOST, 8080),))


STRATEGIES: dict[str, Callable[[Path], AbstractAsyncContextManager[Policed]]] = {
    "tcfilter": tcfilter, "bridge": bridge, "owned": owned, "user": user, "cni": cni,
}  # fmt: skip


@asynccontextmanager
async def _beside(path: Path, strategy: NetworkStrategy) -> AsyncIterator[tuple[str, list[object]]]:
    """Another sandbox on the same bridge, without a policy: its address, and who came to its ports 80 and 443."""
    directory = path / "0987654321"
    await anyio.Path(directory).mkdir()
    visits: list[object] = []
    async with (
        strategy.attach(directory, Wanted(hostname="neighbour")) as attachment, stand_in(attachment) as made,
        AsyncExitStack() as stack,
    ):  # fmt: skip
        for port in (80, 443):
            listener = _listening(made, port)
            server = await asyncio.get_running_loop().create_server(lambda: _Visited(visits), sock=listener)
            stack.enter_context(closing(server))
        yield attachment.interfaces[0].addresses[0].partition("/")[0], visits
    await asyncio.sleep(0)


def _listening(where: Netns, port: int) -> socket.socket:
    found = socket_in(where, socket.AF_INET, socket.SOCK_STREAM)
    found.bind(("", port))
    return found


class _Visited(asyncio.Protocol):
    def __init__(self, visits: list[object]) -> None:
        self._visits = visits

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._visits.append(transport.get_extra_info("peername"))
        transport.close()
