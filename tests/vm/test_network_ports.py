"""Ports are published the same way by every strategy that can: from a socket of the host to one in the guest."""

from __future__ import annotations

import asyncio

import pytest

from pykata import Bridge, Network, NetworkStrategy, PortInUseError, Sandbox, TCFilter
from pykata.guest import Bundle
from tests.outside import got, outside

BUSYBOX = "builtin:busybox"
UNTIL = "until nc 127.0.0.1 80 < /dev/null; do :; done 2> /dev/null"


async def served_through(strategy: NetworkStrategy) -> bytes:
    async with Sandbox(isolation="emulated", network=Network(strategy, ports=["80"])) as sb:
        (port,) = sb.network.ports
        async with sb.container(BUSYBOX) as container:
            await container.run(["sh", "-c", "mkdir /w && echo from the guest > /w/index.html"], check=True)
            async with container.process(["httpd", "-f", "-p", "80", "-h", "/w"]):
                await container.run(["sh", "-c", UNTIL], timeout=600)
                return await got(port)


async def test_on_a_bridge_of_our_own(bundle: Bundle) -> None:
    assert (await served_through(Bridge(network="published"))).endswith(b"from the guest\n")


async def test_beside_a_veth(bundle: Bundle) -> None:
    async with outside() as there:
        assert (await served_through(TCFilter(there.netns.proc_path))).endswith(b"from the guest\n")


async def test_a_port_in_use_is_named_before_anything_starts(bundle: Bundle) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    number = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(PortInUseError, match=f"127.0.0.1:{number}/tcp is in use"):
            async with Sandbox(isolation="emulated", network=Network(ports={number: 80})):
                pass
