"""User-mode networking by passt in a real guest. Debian 12's is too old, so there Debian 13's is fetched, once."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator

import pytest

from pykata import Network, Sandbox, UserNetwork
from pykata.errors import ToolMissingError, ToolTooOldError
from pykata.guest import Bundle
from tests.conftest import ROOT
from tests.outside import CONTENT, Outside, got, outside, serve
from tests.vm.conftest import shared, told

BUSYBOX = "builtin:busybox"
PASST = UserNetwork(via="passt", ipv6=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
async def passt(anyio_backend: str) -> AsyncIterator[None]:
    """That of this machine, or one that is fetched."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            await PASST.program()
        except (ToolMissingError, ToolTooOldError):
            place = ROOT / "build" / "passt"
            await asyncio.to_thread(subprocess.run, [ROOT / "scripts" / "fetch-passt", place], check=True)
            patch.setenv("PYKATA_PASTA", str(place / "pasta"))
        assert (await PASST.program()).name == "pasta"
        yield


@pytest.fixture(scope="module")
async def beyond(anyio_backend: str) -> AsyncIterator[Outside]:
    """Servers that a guest may reach: HTTP of a kind, and a name server."""
    async with outside() as there, there.tcp(serve, 8000), there.tcp(serve, 8006, family=socket.AF_INET6), \
            there.resolver({"db.example": "192.0.2.77"}):
        yield there


@pytest.fixture(scope="module")
async def sb(bundle: Bundle, beyond: Outside, passt: None, anyio_backend: str) -> AsyncIterator[Sandbox]:
    """A sandbox that the tests of this file use, one after the other."""
    async with shared(bundle, network=Network(PASST, ports=["80", "[::1]:0:80"], dns=[beyond.address])) as sandbox:
        yield sandbox


async def test_tcp_and_names_out(sb: Sandbox, beyond: Outside) -> None:
    assert sb.network.via == "passt"
    assert await told(sb, f"echo hi | nc {beyond.address} 8000") == "hello from outside"
    assert await told(sb, f"echo hi | nc {beyond.address6} 8006") == "hello from outside"
    assert "192.0.2.77" in await told(sb, "nslookup db.example")     # by UDP


async def test_megabytes_pass_whole_both_ways(sb: Sandbox, beyond: Outside) -> None:
    # A client that closed its side would get all but the end.
    script = f"mkfifo /f; nc {beyond.address} 8000 < /f & exec 3> /f; echo all >&3; wait"
    done = await sb.shell(BUSYBOX, script, timeout=600, max_output=len(CONTENT) + 1)
    assert done.stdout_bytes == CONTENT
    send = f"(echo count; dd if=/dev/zero bs=64k count=64 2> /dev/null) | nc {beyond.address} 8000"
    assert await told(sb, send) == str(64 << 16)


@pytest.mark.parametrize("where", ["10.0.3.2", "10.0.2.2", "169.254.169.254", "the host's own"])
async def test_the_host_and_the_cloud_are_not_reached(sb: Sandbox, beyond: Outside, where: str) -> None:
    with socket.create_server(("", 0)) as server:
        server.setblocking(False)
        address = beyond.near if where == "the host's own" else where
        said = await told(sb, f"nc -w 30 {address} {server.getsockname()[1]} < /dev/null; echo ended")
        assert "can't connect" in said
        assert "timed out" not in said
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_a_server_in_the_guest_is_reached_through_ports(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        await container.run(["sh", "-c", "mkdir /w && echo from the guest > /w/index.html"], check=True)
        async with container.process(["httpd", "-f", "-p", "80", "-h", "/w"]):
            await container.run(["sh", "-c", "until nc 127.0.0.1 80 < /dev/null; do :; done 2> /dev/null"], timeout=600)
            for port in sb.network.ports:
                assert (await got(port)).endswith(b"from the guest\n")


async def test_a_policy_is_kept(bundle: Bundle, beyond: Outside, passt: None) -> None:
    network = Network(PASST, allow=[f"{beyond.address}:8000"])
    async with Sandbox(isolation="emulated", network=network) as sandbox:
        assert await told(sandbox, f"echo hi | nc {beyond.address} 8000") == "hello from outside"
        assert "can't connect" in await told(sandbox, f"nc {beyond.address} 8001 < /dev/null")
        async for event in sandbox.network.events():
            if (event.action, event.address, event.port) == ("denied", beyond.address, 8001):
                break
        await sandbox.network.deny(beyond.address)
        assert "can't connect" in await told(sandbox, f"echo hi | nc {beyond.address} 8000")
