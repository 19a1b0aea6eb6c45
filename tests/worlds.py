"""A world that tests make: a namespace as Docker or a CNI has one, and what is outside it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from pykata.errors import ToolFailedError
from pykata.host import find_tool, run_tool
from pykata.net import netns
from pykata.net.netlink import netlink
from pykata.net.netns import Netns

GATEWAY = "02:00:00:00:00:01"


async def veth(inside: Netns, outside: Netns, name: str, number: int, mtu: int = 1500) -> None:
    """``name`` in one namespace and its peer in the other, the hosts .2 and .1 of a network of both families."""
    async with netlink(outside) as kernel, netlink(inside) as within:
        link = await kernel.add(f"to-{name}", "veth", address=GATEWAY, peer={"ifname": name, "net_ns_fd": inside.fd})
        await kernel.up(link.index, mtu=mtu)
        mine = await within.link(name)
        await within.up(mine.index, mtu=mtu)
        for address in (f"10.{number}.0.", f"fd0{number}::"):
            prefix = 24 if "." in address else 64
            await kernel.add_address(link.index, f"{address}1/{prefix}")
            await within.add_address(mine.index, f"{address}2/{prefix}")


@asynccontextmanager
async def world(path: Path, *, mtu: int = 1500, interfaces: int = 1) -> AsyncIterator[tuple[Netns, Netns]]:
    """A namespace as Docker or a CNI would make it, pinned, and what is outside it."""
    async with netns.made(path / "net") as inside, netns.made() as outside:
        for number in range(interfaces):
            await veth(inside, outside, f"eth{number}", number + 1, mtu)
        async with netlink(inside) as kernel:
            await kernel.add_route(dst="0.0.0.0/0", gateway="10.1.0.1")
            await kernel.add_route(dst="::/0", gateway="fd01::1", oif=(await kernel.link("eth0")).index)
        yield inside, outside


async def run(inside: Netns, *argv: str, timeout: float = 120.0, input: bytes | None = None) -> str:
    """Run a program in a namespace, and return what it said."""
    program = find_tool(argv[0], package="iproute2")
    enter = [str(find_tool("nsenter", package="util-linux")), f"--net=/proc/self/fd/{inside.fd}", str(program)]
    return (await run_tool([*enter, *argv[1:]], pass_fds=[inside.fd], timeout=timeout, input=input)).decode()


async def ping(where: Netns, address: str, size: int = 56) -> str:
    """What ping says when it is answered. On a busy machine that may be too late for it, or for ARP."""
    argv = ["busybox", "ping", "-c", "1", "-W", "10", "-s", str(size), address]
    for _ in range(5):
        with suppress(ToolFailedError):
            return await run(where, *argv)
    return await run(where, *argv)
