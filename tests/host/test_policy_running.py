"""A policy while packets pass: what it costs in the kernel, what changes it, what is told, what is left."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import dns.rcode
import pytest

from pykata import ConfigError, Rate
from pykata.net import netns
from pykata.net.base import Wanted
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, socket_in
from pykata.net.policy.enforce import Tapped, enforced
from pykata.net.policy.events import line
from pykata.net.policy.flows import MOST_READ
from pykata.net.policy.rules import policy_of
from pykata.net.tap import Tap
from tests import frames
from tests.cancellation import Way, cancel_everywhere
from tests.frames import ACK, SYN, TCP, ethernet, ip4
from tests.netlab import (
    FOURTH,
    GATEWAY_MAC,
    GOOD,
    GUEST,
    GUEST6,
    MAC,
    OTHER,
    RUN_DIR,
    THIRD,
    Lab,
    client_hello,
    lab,
    record,
)

TABLE = "pykata-pk0123456789t"
GET = b"GET / HTTP/1.1\r\nHost: good.example\r\n\r\n"


@pytest.fixture
async def world() -> AsyncIterator[Lab]:
    async with lab(["good.example", "10.0.0.0/8:443", "hosted.example", "git.example:22"]) as found:
        yield found


async def run(netns: Netns, *words: str) -> str:
    """Run a program in a namespace."""
    done = await anyio.run_process(["nsenter", f"--net={netns.proc_path}", *words])
    return done.stdout.decode()


async def asked(netns: Netns) -> int:
    """How many packets the kernel asked about."""
    listed = json.loads(await run(netns, "nft", "--json", "list", "table", "netdev", TABLE))["nftables"]
    rules = [each["rule"] for each in listed if "rule" in each and each["rule"]["chain"] == "ask"]
    return int(next(part["counter"]["packets"] for part in rules[0]["expr"] if "counter" in part))


async def echo(world: Lab, found: socket.socket, total: int) -> None:
    """Send so many bytes, and read the answers."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(found, bytes(total))
    await world.receive(found)


# --- what is allowed ---


async def test_the_kernel_asks_about_the_beginning_of_a_connection_only(world: Lab) -> None:
    await world.addresses("good.example")
    with await world.connect(GOOD, 443) as found:
        # What follows shows that the server has chosen: there won't be another ClientHello.
        for flight in (client_hello(), record(20, b"\1") + record(23, bytes(53))):
            await asyncio.get_running_loop().sock_sendall(found, flight)
            await world.receive(found)
        before = await asked(world.sandbox)
        for _ in range(20):
            await echo(world, found, 100_000)
        assert await asked(world.sandbox) - before <= 2      # an acknowledgement that was under way


async def test_requests_of_http_are_all_read_and_acknowledgements_are_not(world: Lab) -> None:
    world.world.reply = bytes(200_000)
    await world.addresses("good.example")
    with await world.connect(GOOD, 80) as found:
        loop = asyncio.get_running_loop()
        before = await asked(world.sandbox)
        for _ in range(5):
            await loop.sock_sendall(found, GET)
            left = len(world.world.reply)
            while left:
                left -= len(await world.receive(found))
        assert await asked(world.sandbox) - before < 40


async def test_an_upload_by_http(world: Lab) -> None:
    await world.addresses("good.example")
    body = bytes(range(256)) * 2000
    head = b"PUT /x HTTP/1.1\r\nHost: good.example\r\nContent-Length: %d\r\n\r\n" % len(body)
    with await world.connect(GOOD, 80) as found:
        await asyncio.get_running_loop().sock_sendall(found, head + body + GET)
        wanted = len(head + body + GET)
        async with asyncio.timeout(120):
            while len(b"".join(world.world.received.get((GOOD, 80), []))) < wanted:
                await world.receive(found)
    assert b"".join(world.world.received[GOOD, 80]) == head + body + GET


async def test_a_server_that_speaks_first(world: Lab) -> None:
    world.resolver.records["git.example", "A"] = [THIRD]
    await world.addresses("git.example")
    assert await world.talk(THIRD, 22, b"SSH-2.0-client\r\n") == b"reply"


async def test_a_name_of_the_guests_hosts_file(world: Lab) -> None:
    assert await world.talk(FOURTH, 443, client_hello("hosted.example")) == b"reply"


async def test_other_types_of_an_allowed_name(world: Lab) -> None:
    assert "hello" in str((await world.lookup("good.example", "TXT")).answer[0])
    assert (await world.lookup("good.example", "HTTPS")).answer == []
    assert ("good.example", "HTTPS") not in world.resolver.asked


async def test_a_name_that_does_not_exist_and_a_resolver_that_is_gone(world: Lab) -> None:
    assert (await world.lookup("git.example")).rcode() == 3
    world.resolver.rewrite = lambda response: response.set_rcode(dns.rcode.SERVFAIL)
    assert (await world.lookup("good.example")).rcode() == 2


async def test_others_reach_the_guest(world: Lab) -> None:
    loop = asyncio.get_running_loop()
    for address in (GUEST, GUEST6):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket_in(world.guest, family, socket.SOCK_STREAM) as server:
            server.setblocking(False)
            server.bind((address, 8000))
            server.listen()
            with socket_in(world.world.netns, family, socket.SOCK_STREAM) as client:
                client.setblocking(False)
                async with asyncio.timeout(120):
                    await loop.sock_connect(client, (address, 8000))
                    accepted, _ = await loop.sock_accept(server)
                    with accepted:
                        await loop.sock_sendall(accepted, b"answer")
                        assert await loop.sock_recv(client, 100) == b"answer"
    for family, address in ((socket.AF_INET, GUEST), (socket.AF_INET6, GUEST6)):
        with (
            socket_in(world.guest, family, socket.SOCK_DGRAM) as server,
            socket_in(world.world.netns, family, socket.SOCK_DGRAM) as client,
        ):
            server.bind((address, 8000))
            server.setblocking(False)
            client.setblocking(False)
            client.connect((address, 8000))
            client.send(b"question")
            async with asyncio.timeout(120):
                _, back = await loop.sock_recvfrom(server, 100)
                server.sendto(b"answer", back)
                assert await loop.sock_recv(client, 100) == b"answer"


async def ping(netns: Netns, address: str) -> bytes:
    """Send an echo request, and what comes back but requests."""
    loop = asyncio.get_running_loop()
    six = ":" in address
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
    with socket_in(netns, family, socket.SOCK_RAW, protocol) as found:
        found.setblocking(False)
        # The kernel fills in the checksum of ICMPv6.
        found.sendto(b"\x80\0\0\0\0\1\0\1ping" if six else frames.icmp(8, b"ping"), (address, 0))
        async with asyncio.timeout(120):
            while True:
                came = await loop.sock_recv(found, 1000)
                kind = came[0] if six else came[20]
                if kind in ((1, 129) if six else (0, 3)):
                    return came


async def test_a_guest_answers_pings(world: Lab) -> None:
    for address in (GUEST, GUEST6):
        assert (await ping(world.world.netns, address)).endswith(b"ping")


async def test_everything_but_what_is_denied() -> None:
    async with lab(None, ["evil.example", OTHER]) as world:
        assert await world.talk(THIRD, 443, client_hello("good.example")) == b"reply"
        assert await world.datagram(THIRD, 9000, b"?") == b"reply"
        assert await world.addresses("evil.example") == []
        with pytest.raises(ConnectionRefusedError):
            await world.connect(OTHER, 443)
        with pytest.raises(ConnectionResetError):
            await world.talk(THIRD, 443, client_hello("evil.example"))


async def test_ping_where_it_is_allowed() -> None:
    async with lab([f"icmp:{GOOD}"]) as world:
        assert (await ping(world.guest, GOOD))[20] == 0
        assert (await ping(world.guest, OTHER))[20:22] == b"\3\x0d"     # administratively prohibited
        await world.event(action="allowed", protocol="icmp", address=GOOD)


# --- it changes ---


async def test_more_is_allowed_while_it_runs(world: Lab) -> None:
    assert await world.addresses("other.example") == []
    await world.guard.allow("other.example", f"udp:{THIRD}:9000")
    assert await world.addresses("other.example") == [OTHER]
    assert await world.talk(OTHER, 443, client_hello("other.example")) == b"reply"
    assert await world.datagram(THIRD, 9000, b"?") == b"reply"
    with pytest.raises(ConfigError, match="'a b'"):
        await world.guard.allow("a b")


async def test_what_is_denied_while_it_runs_is_cut(world: Lab) -> None:
    await world.guard.allow(f"{THIRD}:9000", f"udp:{THIRD}:9000")
    await world.addresses("good.example")
    loop = asyncio.get_running_loop()
    with await world.connect(GOOD, 443) as tls, await world.connect(THIRD, 9000) as plain:
        await loop.sock_sendall(tls, client_hello())
        await world.receive(tls)
        await echo(world, plain, 10)
        assert await world.datagram(THIRD, 9000, b"?") == b"reply"
        await world.guard.deny("good.example", THIRD)
        await world.event(action="denied", address=GOOD, reason="denied")
        for found in (tls, plain):
            await loop.sock_sendall(found, b"more")
            with pytest.raises(ConnectionResetError):
                await world.receive(found)
    with pytest.raises(OSError, check=lambda exc: exc.errno == errno.EHOSTUNREACH):
        await world.datagram(THIRD, 9000, b"?")
    assert await world.addresses("good.example") == []
    with pytest.raises(ConnectionRefusedError):
        await world.connect(GOOD, 443)


async def test_a_rate_can_not_be_changed() -> None:
    async with lab(None, rate=Rate(packets_per_second=100)) as world:
        assert await world.datagram(THIRD, 9000, b"?") == b"reply"
        with pytest.raises(ConfigError, match="only has a rate"):
            await world.guard.deny(THIRD)


# --- rates ---


async def test_packets_over_the_rate_are_dropped() -> None:
    async with lab(None, rate=Rate(packets_per_second=50)) as world:
        with world.raw() as found:
            sent = frame(ip4(GUEST, THIRD, 17, frames.udp(GUEST, THIRD, 5000, 9000, b"x")))
            for _ in range(2000):
                found.send(sent)
        # A counter tells as soon as they were sent: on a veth sending and being dropped are the same call.
        dropped = await run(world.sandbox, "nft", "list", "chain", "netdev", TABLE, "from_guest")
        assert "limit rate over 50/second" in dropped
        assert len(world.world.received.get(("udp", 9000), [])) < 2000


async def test_bytes_over_the_rate_wait_or_are_dropped() -> None:
    async with lab(None, rate=Rate(bits_per_second=8_000_000)) as world:
        shown = await run(world.sandbox, "tc", "qdisc")
        assert "tbf" in shown
        assert "rate 8Mbit" in shown
        assert "limit rate over 1" in await run(world.sandbox, "nft", "list", "table", "netdev", TABLE)
        assert await world.talk(THIRD, 9000, b"x" * 1000) == b"reply"


# --- events ---


def frame(payload: bytes) -> bytes:
    return ethernet(0x0800, payload, source=MAC, destination=GATEWAY_MAC)


async def test_what_repeats_is_told_together(world: Lab) -> None:
    sent = frame(ip4(GUEST, OTHER, TCP, frames.tcp(GUEST, OTHER, 5000, 443, flags=SYN)))
    for _ in range(50):
        world.send_frame(sent)
    counted = told = 0
    async with asyncio.timeout(120):
        async for event in world.guard.events():
            if event.address == OTHER:
                counted, told = counted + event.count, told + 1
            if counted == 50:
                break
    assert told <= 5


async def test_events_are_lines_of_json(world: Lab) -> None:
    with pytest.raises(ConnectionRefusedError):
        await world.connect(OTHER, 443)
    event = await world.event(action="denied")
    said = json.loads(line(event))
    assert (said["action"], said["address"], said["port"], said["count"]) == ("denied", OTHER, 443, 1)
    assert line(event).count("\n") == 1


async def test_readers_end_with_the_sandbox() -> None:
    async with lab(["good.example"]) as world:
        reader = asyncio.ensure_future(anext(aiter(world.guard.events()), None))
        await asyncio.sleep(0)
    assert await reader is None


# --- floods, failures ---


async def test_a_flood_does_not_stop_what_is_allowed(world: Lab) -> None:
    await world.addresses("good.example")
    with world.raw() as found:
        for number in range(20_000):
            source = f"10.81.{number % 250}.9"
            found.send(frame(ip4(source, OTHER, TCP, frames.tcp(source, OTHER, number % 60000, 443, flags=SYN))))
    assert await world.talk(GOOD, 443, client_hello()) == b"reply"
    assert world.guard.remembered <= 1000


async def test_nobody_gets_out_while_nobody_decides(world: Lab) -> None:
    await world.addresses("good.example")
    guard = world.guard._guards[0]
    await guard.close()
    world.world.received.clear()
    world.send_frame(frame(ip4(GUEST, GOOD, TCP, frames.tcp(GUEST, GOOD, 5000, 443, flags=SYN))))
    world.send_frame(frame(ip4(GUEST, OTHER, 17, frames.udp(GUEST, OTHER, 5000, 9000, b"x"))))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await world.connect(GOOD, 443)
    assert world.world.received == {}


async def test_a_failure_of_ours_ends_the_sandbox(world: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = world.guard._guards[0]

    def fail(frame: bytes) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(guard._inspector, "_frame", fail)
    world.send_frame(frame(ip4(GUEST, OTHER, 17, frames.udp(GUEST, OTHER, 5000, 9000, b"x"))))
    async with asyncio.timeout(120):
        assert await guard.lost() == "the policy failed"
    assert world.world.received == {}


# --- nothing grows, nothing is left ---


async def test_connections_that_never_show_a_name_take_a_bounded_place(world: Lab) -> None:
    await world.addresses("good.example")
    inspector = world.guard._guards[0]._inspector
    for port in range(1000, 3000):
        inspector.from_guest(frame(ip4(GUEST, GOOD, TCP, frames.tcp(GUEST, GOOD, port, 443, flags=SYN))))
        data = frames.tcp(GUEST, GOOD, port, 443, flags=ACK, seq=1, payload=client_hello()[:100])
        inspector.from_guest(frame(ip4(GUEST, GOOD, TCP, data)))
    assert inspector.flows.reading == len(inspector.flows) == MOST_READ
    kept = await run(world.sandbox, "nft", "list", "set", "netdev", TABLE, "read4")
    assert kept.count("443 .") == MOST_READ


async def test_whoever_is_cancelled_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    async with netns.made() as inside, netlink(inside) as kernel:
        await kernel.add("pk0123456789t", "veth", peer={"ifname": "uplink"})
        tap = Tap("pk0123456789t", (await kernel.link("pk0123456789t")).index, -1, inside)
        wanted = Wanted(policy=policy_of(["good.example"], (), Rate(bits_per_second=1_000_000)))
        before = sorted(each.name for each in await kernel.links())

        async def work() -> None:
            async with enforced(RUN_DIR, [Tapped(tap, MAC, (GUEST,), "uplink")], wanted):
                pass

        async def check(n: int, way: Way) -> None:
            assert sorted(each.name for each in await kernel.links()) == before
            assert await run(inside, "nft", "list", "tables") == ""
            assert "tbf" not in await kernel.qdiscs(tap.index)

        assert await cancel_everywhere(work, check, step=3) > 3
