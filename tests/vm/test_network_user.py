"""User-mode networking in a real guest: what it reaches, what it doesn't, and what reaches it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from pykata import Network, Rate, Sandbox, ShareLostError, UserNetwork
from pykata.guest import Bundle
from tests.outside import Outside, got, outside
from tests.vm.conftest import shared, told

BUSYBOX = "builtin:busybox"
NAMES = {"db.example": "192.0.2.77", "web.corp.example": "192.0.2.78"}
CONTENT = os.urandom(1 << 16) * 64


@pytest.fixture(scope="module")
async def beyond(anyio_backend: str) -> AsyncIterator[Outside]:
    """Servers that a guest may reach: HTTP of a kind, an echo of datagrams, and a name server."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CONTENT if await reader.readline() == b"all\n" else b"hello from outside\n")

    async with outside() as there, there.tcp(serve, 8000), there.tcp(serve, 8006, family=socket.AF_INET6), \
            there.udp(lambda data: data.upper(), 9000), there.resolver(NAMES):
        yield there


@pytest.fixture(scope="module")
async def sb(bundle: Bundle, beyond: Outside, anyio_backend: str) -> AsyncIterator[Sandbox]:
    """A sandbox that all tests of this file use, one after the other."""
    network = Network(
        UserNetwork(ipv6=True), ports=["80", "[::1]:0:80"], dns=[beyond.address], search=["corp.example"],
        hosts={"db_1": "10.0.0.5"},
    )  # fmt: skip
    async with shared(bundle, hostname="guest", network=network) as sandbox:
        yield sandbox


async def test_tcp_out_over_ipv4_and_ipv6(sb: Sandbox, beyond: Outside) -> None:
    assert await told(sb, f"echo hi | nc {beyond.address} 8000") == "hello from outside"
    assert await told(sb, f"echo hi | nc {beyond.address6} 8006") == "hello from outside"


async def test_megabytes_come_whole(sb: Sandbox, beyond: Outside) -> None:
    done = await sb.shell(BUSYBOX, f"echo all | nc {beyond.address} 8000", timeout=600, max_output=len(CONTENT) + 1)
    assert done.stdout_bytes == CONTENT


async def test_names_are_found_with_the_servers_that_were_asked_for(sb: Sandbox) -> None:
    assert "192.0.2.77" in await told(sb, "nslookup db.example")
    assert "NXDOMAIN" in await told(sb, "nslookup nobody.example")


async def test_every_container_has_the_names(sb: Sandbox, beyond: Outside) -> None:
    async with sb.container(BUSYBOX) as one, sb.container(BUSYBOX) as two:
        for container in (one, two):
            resolv = (await container.run(["cat", "/etc/resolv.conf"])).stdout
            assert resolv == f"nameserver {beyond.address}\nsearch corp.example\n"
            hosts = (await container.run(["cat", "/etc/hosts"])).stdout
            assert "10.0.0.5\tdb_1\n" in hosts
            assert "10.0.2.15\tguest\n" in hosts


async def test_containers_share_localhost(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as one, sb.container(BUSYBOX) as two:
        await one.run(["sh", "-c", "mkdir /w && echo shared > /w/index.html"], check=True)
        async with one.process(["httpd", "-f", "-p", "127.0.0.1:8089", "-h", "/w"]):
            until_it_listens = "until nc 127.0.0.1 8089 < /dev/null; do :; done"
            asked = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc 127.0.0.1 8089"
            done = await two.run(["sh", "-c", f"{until_it_listens} 2> /dev/null; {asked}"], timeout=600)
            assert done.stdout.endswith("shared\n")


async def test_a_policy_is_kept_at_the_guests_tap(bundle: Bundle, beyond: Outside) -> None:
    network = Network(allow=[f"{beyond.address}:8000"])
    async with Sandbox(isolation="emulated", network=network) as sandbox:
        assert await told(sandbox, f"echo hi | nc {beyond.address} 8000") == "hello from outside"
        assert "can't connect" in await told(sandbox, f"nc {beyond.address} 8001 < /dev/null")
        assert "can't connect" in await told(sandbox, "nc 169.254.169.254 80 < /dev/null")
        denied = set()
        async for event in sandbox.network.events():
            if event.action == "denied":
                denied.add((event.address, event.port))
            if {(beyond.address, 8001), ("169.254.169.254", 80)} <= denied:
                break
        await sandbox.network.deny(beyond.address)
        assert "can't connect" in await told(sandbox, f"echo hi | nc {beyond.address} 8000")


@pytest.mark.parametrize("where", ["10.0.3.2", "10.0.2.2", "169.254.169.254"])
async def test_the_host_and_the_cloud_are_not_reached(sb: Sandbox, where: str) -> None:
    with socket.create_server(("", 0)) as server:
        server.setblocking(False)
        said = await told(sb, f"nc -w 30 {where} {server.getsockname()[1]} < /dev/null; echo ended")
        assert "can't connect" in said
        assert "timed out" not in said
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_the_hosts_own_addresses_are_not_reached(sb: Sandbox, beyond: Outside) -> None:
    with socket.create_server((beyond.near, 0)) as server:
        server.setblocking(False)
        said = await told(sb, f"nc -w 30 {beyond.near} {server.getsockname()[1]} < /dev/null")
        assert "No route to host" in said       # at once, and not after half a minute
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_a_server_in_the_guest_is_reached_through_ports(sb: Sandbox) -> None:
    four, six = sb.network.ports
    assert (four.guest, four.address, six.address) == (80, "127.0.0.1", "::1")
    assert four.host != 0
    async with sb.container(BUSYBOX) as container:
        await container.run(["sh", "-c", "mkdir /w && echo from the guest > /w/index.html"], check=True)
        async with container.process(["httpd", "-f", "-p", "80", "-h", "/w"]):
            await container.run(["sh", "-c", "until nc 127.0.0.1 80 < /dev/null; do :; done 2> /dev/null"], timeout=600)
            for port in (four, six):
                assert (await got(port)).endswith(b"from the guest\n")
            async with anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(got, four)


async def test_a_published_port_without_a_server_resets(sb: Sandbox) -> None:
    with pytest.raises(ConnectionResetError):
        await got(sb.network.ports[0])


ECHO = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("", 5353))
    print("ready", flush=True)
    while True:
        data, address = server.recvfrom(65536)
        server.sendto(data.upper(), address)
"""
ASK = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.settimeout(1)
    client.connect((sys.argv[1], 9000))
    while True:
        client.send(b"datagram")
        try:
            print(client.recv(100).decode())
            break
        except TimeoutError:        # UDP may lose it
            continue
"""


async def test_datagrams_out(sb: Sandbox, beyond: Outside, demo_image: str) -> None:
    done = await sb.run(demo_image, ["python3", "-c", ASK, beyond.address], timeout=600, check=True)
    assert done.stdout == "DATAGRAM\n"


async def test_datagrams_through_ports(bundle: Bundle, demo_image: str) -> None:
    network = Network(ports=["5353/udp"])
    async with Sandbox(isolation="emulated", network=network) as sandbox:
        (port,) = sandbox.network.ports
        async with sandbox.process(demo_image, ["python3", "-c", ECHO]) as server:
            assert await anext(aiter(server.stdout)) == b"ready\n"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as client:
                client.connect((port.address, port.host))
                said = b""
                while not said:             # UDP may lose it
                    client.send(b"datagram")
                    with anyio.move_on_after(1):
                        said = await asyncio.get_running_loop().sock_recv(client, 100)
                assert said == b"DATAGRAM"


async def test_what_the_sandbox_says_of_its_network(sb: Sandbox) -> None:
    assert sb.network.addresses == ("10.0.2.15", "fd00:0:0:2::15")


async def test_with_host_its_loopback_is_reached(bundle: Bundle) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"the host\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    number = server.sockets[0].getsockname()[1]
    async with server, Sandbox(isolation="emulated", network=UserNetwork(host=True)) as sandbox:
        assert await told(sandbox, f"nc host.internal {number} < /dev/null") == "the host"
        assert "host.internal" in await told(sandbox, "cat /etc/hosts")


async def test_a_detached_sandbox_keeps_its_network(bundle: Bundle, beyond: Outside) -> None:
    network = Network(allow=[f"{beyond.address}:8000"], ports=[80])
    detached = await Sandbox(isolation="emulated", network=network).detach("networked", BUSYBOX)
    try:
        async with Sandbox.connect("networked") as sandbox:
            (port,) = sandbox.network.ports
            assert sandbox.network.addresses[0] == "10.0.2.15"
            await sandbox.main.run(["sh", "-c", "mkdir /w && echo from the guest > /w/index.html"], check=True)
            async with sandbox.main.process(["httpd", "-f", "-p", "80", "-h", "/w"]):
                until = ["sh", "-c", "until nc 127.0.0.1 80 < /dev/null; do :; done 2> /dev/null"]
                await sandbox.main.run(until, timeout=600)
                assert (await got(port)).endswith(b"from the guest\n")
            assert "can't connect" in await told(sandbox, f"nc {beyond.address} 8001 < /dev/null")
            async for event in sandbox.network.events():
                if (event.action, event.port) == ("denied", 8001):
                    break
            await sandbox.network.deny(beyond.address)
            assert "can't connect" in await told(sandbox, f"nc {beyond.address} 8000 < /dev/null")
    finally:
        await detached.stop()


def test_on_the_command_line(bundle: Bundle, beyond: Outside, tmp_path: Path) -> None:
    log = tmp_path / "events"
    argv = [
        sys.executable, "-m", "pykata_cli", "run", "--isolation", "emulated", "-p", "80",
        "--allow", f"{beyond.address}:8000", "--network-log", str(log), "--add-host", "db:10.0.0.5",
        BUSYBOX, "--", "sh", "-c",
        f"grep -w db /etc/hosts; nc {beyond.address} 8001 < /dev/null; read line",
    ]  # fmt: skip
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            end = time.monotonic() + 600
            while not log.exists() or '"port": 8001' not in log.read_text():      # it ends when it is told so
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            said, complaints = process.communicate("\n", timeout=600)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, complaints
    assert said == "10.0.0.5\tdb\n"
    assert re.search(r"pykata: 127\.0\.0\.1:[0-9]+ -> 80/tcp", complaints)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert (beyond.address, 8001) in {(each["address"], each["port"]) for each in events if each["action"] == "denied"}


async def test_the_machine_ends_with_the_program_that_connects_it(bundle: Bundle) -> None:
    before = uplinks()
    async with Sandbox(isolation="emulated", network="user") as sandbox:
        (uplink,) = uplinks() - before
        async with sandbox.process(BUSYBOX, ["sleep", "60"]) as process:
            os.kill(uplink, 9)
            with pytest.raises(ShareLostError, match="slirp4netns was killed by SIGKILL"):
                await process.wait()


def uplinks() -> set[int]:
    return {int(each) for each in os.listdir("/proc") if each.isdigit() and _is_uplink(int(each))}


def _is_uplink(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        with open(f"/proc/{pid}/comm") as file:
            return file.read() == "slirp4netns\n" and int(fields[1]) == os.getpid()
    except OSError:
        return False


async def test_a_policy_says_itself_which_address_of_the_host_is_reached(bundle: Bundle, beyond: Outside) -> None:
    with socket.create_server((beyond.near, 0)) as server, socket.create_server((beyond.near, 0)) as other:
        port = server.getsockname()[1]
        network = Network(allow=[f"{beyond.near}:{port}"])
        async with Sandbox(isolation="emulated", network=network) as sandbox:
            for each in (server, other):
                each.setblocking(False)
            async with asyncio.TaskGroup() as tasks:
                said = tasks.create_task(told(sandbox, f"nc {beyond.near} {port} < /dev/null; echo ended"))
                connection, _ = await asyncio.get_running_loop().sock_accept(server)
                connection.close()      # nc waits for that
            assert said.result() == "ended"
            refused = await told(sandbox, f"nc {beyond.near} {other.getsockname()[1]} < /dev/null")
            assert "can't connect" in refused
            with pytest.raises(BlockingIOError):
                other.accept()


async def test_a_rate_opens_nothing(bundle: Bundle, beyond: Outside) -> None:
    network = Network(rate=Rate(packets_per_second=1000))
    async with Sandbox(isolation="emulated", network=network) as sandbox:
        assert await told(sandbox, f"echo hi | nc {beyond.address} 8000") == "hello from outside"
        for address in ("169.254.169.254", beyond.near):
            assert "can't connect" in await told(sandbox, f"nc {address} 80 < /dev/null")
