"""User-mode networking by QEMU itself in a real guest: what it reaches, and that the host isn't among it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pykata import Network, Sandbox, ShareLostError, UserNetwork
from pykata.guest import Bundle
from pykata.net import user_qemu
from tests.outside import CONTENT, Outside, got, outside, serve
from tests.vm.conftest import shared, told

BUSYBOX = "builtin:busybox"


@pytest.fixture(scope="module")
async def beyond(anyio_backend: str) -> AsyncIterator[Outside]:
    """Servers that a guest may reach: HTTP of a kind, and a name server."""
    async with outside() as there, there.tcp(serve, 8000), there.resolver({"db.example": "192.0.2.77"}):
        yield there


@pytest.fixture(scope="module", params=["gate", "sieve"])
async def sb(
    bundle: Bundle, beyond: Outside, anyio_backend: str, request: pytest.FixtureRequest
) -> AsyncIterator[Sandbox]:
    """A sandbox that the tests of this file use, one after the other: each way to keep its guest from the host."""
    network = Network(UserNetwork(via="qemu"), ports=[80], dns=[beyond.address])
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "sieve":
            patch.setattr(user_qemu, "_worked", False)
        async with shared(bundle, network=network) as sandbox:
            patch.undo()
            assert (len(beside("sieve.py")), len(beside("gate.py"))) == \
                ((1, 0) if request.param == "sieve" else (0, 1))
            yield sandbox


async def test_out_with_names(sb: Sandbox, beyond: Outside) -> None:
    assert sb.network.via == "qemu"
    assert await told(sb, f"echo hi | nc {beyond.address} 8000") == "hello from outside"
    assert "192.0.2.77" in await told(sb, "nslookup db.example")


async def test_megabytes_pass_whole_both_ways(sb: Sandbox, beyond: Outside) -> None:
    done = await sb.shell(BUSYBOX, f"echo all | nc {beyond.address} 8000", timeout=600, max_output=len(CONTENT) + 1)
    assert done.stdout_bytes == CONTENT
    send = f"(echo count; dd if=/dev/zero bs=64k count=64 2> /dev/null) | nc {beyond.address} 8000"
    assert await told(sb, send) == str(64 << 16)


@pytest.mark.parametrize("where", ["10.0.2.2", "10.0.2.3", "169.254.169.254", "the host's own"])
async def test_the_host_and_the_cloud_are_not_reached(sb: Sandbox, beyond: Outside, where: str) -> None:
    with socket.create_server(("", 0)) as server:
        server.setblocking(False)
        address = beyond.near if where == "the host's own" else where
        said = await told(sb, f"nc -w 20 {address} {server.getsockname()[1]} < /dev/null")
        # That one is the host's name server, wherever this is.
        assert "No route to host" in said or where == "10.0.2.3"
        with pytest.raises(BlockingIOError):
            server.accept()


SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    for address in sys.argv[2:]:
        client.sendto(b"datagram", (address, int(sys.argv[1])))
"""


async def test_a_route_to_the_loopback_leads_nowhere(sb: Sandbox, beyond: Outside, demo_image: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        # UDP to a group, to everybody, and to the gateway: QEMU would deliver them here.
        there = ["10.0.2.2", "255.255.255.255", "224.0.0.1"]
        await sb.run(demo_image, ["python3", "-c", SEND, str(port), *there], timeout=600, check=True)
        assert "192.0.2.77" in await told(sb, "nslookup db.example")     # what was sent before has been judged
        with pytest.raises(BlockingIOError):
            server.recv(100)


async def test_a_server_in_the_guest_is_reached_through_ports(sb: Sandbox) -> None:
    (port,) = sb.network.ports
    async with sb.container(BUSYBOX) as container:
        await container.run(["sh", "-c", "mkdir /w && echo from the guest > /w/index.html"], check=True)
        async with container.process(["httpd", "-f", "-p", "80", "-h", "/w"]):
            await container.run(["sh", "-c", "until nc 127.0.0.1 80 < /dev/null; do :; done 2> /dev/null"], timeout=600)
            assert (await got(port)).endswith(b"from the guest\n")


async def test_with_host_its_loopback_is_reached(bundle: Bundle) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"the host\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    number = server.sockets[0].getsockname()[1]
    async with server, Sandbox(isolation="emulated", network=UserNetwork(via="qemu", host=True)) as sandbox:
        assert await told(sandbox, f"nc host.internal {number} < /dev/null") == "the host"


async def test_the_machine_ends_with_the_process_that_judges(bundle: Bundle) -> None:
    before = beside("gate.py")
    async with Sandbox(isolation="emulated", network=UserNetwork(via="qemu")) as sandbox:
        (judge,) = beside("gate.py") - before
        async with sandbox.process(BUSYBOX, ["sleep", "60"]) as process:
            os.kill(judge, 9)
            with pytest.raises(ShareLostError, match="judges QEMU's connections was killed by SIGKILL"):
                await process.wait()


async def test_the_machine_ends_with_the_process_in_between(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_qemu, "_worked", False)
    before = beside("sieve.py")
    async with Sandbox(isolation="emulated", network=UserNetwork(via="qemu")) as sandbox:
        (sieve,) = beside("sieve.py") - before
        async with sandbox.process(BUSYBOX, ["sleep", "60"]) as process:
            os.kill(sieve, 9)
            with pytest.raises(ShareLostError, match="the process before QEMU's network was killed by SIGKILL"):
                await process.wait()


def beside(program: str) -> set[int]:
    """The processes of this kind that we have."""
    me = os.getpid()
    children = map(int, Path(f"/proc/{me}/task/{me}/children").read_text().split())
    return {each for each in children if program in Path(f"/proc/{each}/cmdline").read_text()}


PROGRAM = """
import asyncio, sys
from pykata import Sandbox

async def main():
    async with Sandbox(isolation="emulated", network="user") as sb:
        print(sb.network.via)
        print((await sb.shell("builtin:busybox", f"echo hi | nc {sys.argv[1]} 8000", timeout=600)).stdout, end="")

asyncio.run(main())
"""


async def test_where_namespaces_are_forbidden_it_is_what_user_means(bundle: Bundle, beyond: Outside) -> None:
    none_below = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    argv = ["unshare", "--user", "--map-root-user", "sh", "-c", none_below, "sh", sys.executable, "-c", PROGRAM]
    process = await asyncio.create_subprocess_exec(*argv, beyond.address, stdout=-1, stderr=-1)
    said, complaints = await process.communicate()
    assert (said, process.returncode) == (b"qemu\nhello from outside\n", 0), complaints
