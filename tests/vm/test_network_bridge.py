"""Sandboxes on bridges."""

from __future__ import annotations

from pykata import Bridge, Sandbox
from pykata.net import netns
from tests.vm.conftest import until
from tests.worlds import ping

BUSYBOX = "builtin:busybox"
SERVE = "mkdir /www && echo hello from $(hostname) > /www/index.html && httpd -p 80 -h /www"


async def test_two_sandboxes_talk_by_name() -> None:
    lab = Bridge(network="talk", ipv6=True)
    async with (
        Sandbox(network=lab, hostname="server", isolation="emulated") as one,
        Sandbox(network=lab, hostname="client", isolation="emulated") as other,
        one.container(BUSYBOX) as server,
        other.container(BUSYBOX) as client,
    ):
        await server.run(["sh", "-c", SERVE], check=True)
        fetched = await client.shell(until("wget -q -O - http://server/"), check=True, timeout=600)
        assert fetched.stdout == "hello from server\n"
        (four, six) = one.network.addresses
        for address in (four, f"[{six}]"):
            assert (await client.shell(until(f"wget -q -O - http://{address}/"), timeout=600)).stdout
        assert "1 packets received" in (await client.shell(until("ping -c 1 -W 10 server"), timeout=600)).stdout
        with netns.opened() as host:
            assert "1 packets received" in await ping(host, four)


async def test_isolated_sandboxes_do_not() -> None:
    apart = Bridge(network="cells", isolated=True)
    async with (
        Sandbox(network=apart, hostname="one", isolation="emulated") as one,
        Sandbox(network=apart, hostname="other", isolation="emulated") as other,
    ):
        (address,) = other.network.addresses
        done = await one.run(BUSYBOX, ["ping", "-c", "1", "-W", "2", address], timeout=600)
        assert "0 packets received" in done.stdout
