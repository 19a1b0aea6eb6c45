"""MacVTap and CNI with real guests."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pykata import CNI, MacVTap, Network, Sandbox
from tests.cni_chain import chain, without_bridge
from tests.vm.conftest import until
from tests.worlds import ping, world

BUSYBOX = "builtin:busybox"
SERVE = "mkdir /www && echo hello from the guest > /www/index.html && httpd -p 80 -h /www"


async def test_macvtap(tmp_path: Path) -> None:
    async with (
        world(tmp_path, mtu=9000) as (inside, outside),
        Sandbox(network=MacVTap(inside.path), isolation="emulated") as sb,
    ):
        for there, back in (("10.1.0.1", "10.1.0.2"), ("fd01::1", "fd01::2")):
            done = await sb.shell(BUSYBOX, until(f"ping -c 1 -W 10 -s 8900 {there}"), timeout=600)
            assert "1 packets received" in done.stdout
            assert "1 packets received" in await ping(outside, back, 8900)


async def test_a_cni_chain_from_end_to_end(tmp_path: Path) -> None:
    network = Network(CNI(chain(tmp_path)), ports={18090: 80})
    try:
        async with Sandbox(network=network, isolation="emulated") as sb, sb.container(BUSYBOX) as box:
            assert (sb.network.addresses, sb.network.ports[0].host) == (("10.66.0.2",), 18090)
            await box.run(["sh", "-c", SERVE], check=True)
            said = await box.shell(f"cat /etc/resolv.conf; {until('ping -c 1 -W 10 10.66.0.1')}", check=True)
            assert "nameserver 10.66.0.1" in said.stdout
            assert "1 packets received" in said.stdout
            reader, writer = await asyncio.open_connection("127.0.0.1", 18090)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            assert b"hello from the guest" in await reader.read()
            writer.close()
            await writer.wait_closed()
    finally:
        await without_bridge()
