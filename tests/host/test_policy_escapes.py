"""Attempts to get out past a policy, by addresses and names: each is refused, and told."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator

import dns.edns
import dns.message
import dns.name
import dns.rcode
import pytest

from tests import frames
from tests.attempts import POLICY, allowed, reached_nothing, refused
from tests.frames import SYN, TCP, UDP, ip4
from tests.lies import frame
from tests.netlab import (
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


@pytest.fixture
async def world() -> AsyncIterator[Lab]:
    async with lab(POLICY) as found:
        yield found


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


@pytest.mark.parametrize("address", [
    "0.0.0.0", "255.255.255.255", "100.64.0.1", "198.18.0.1", "192.168.1.1", "172.16.0.1", "224.0.0.251",  # noqa: S104
    "::", "::1", "::ffff:20.0.0.2", "::20.0.0.2", "::ffff:0:20.0.0.2", "64:ff9b::20.0.0.2", "64:ff9b:1::1",
    "2002:1400:2::1", "2001:0:1400:2::1", "fe80::1", "fec0::1", "fd00:ec2::254", "fd81:7::1", "ff02::1", "4000::1",
    "100::1",
])  # fmt: skip
async def test_a_name_that_leads_to_an_address_that_nobody_has(world: Lab, address: str) -> None:
    kind = "AAAA" if ":" in address else "A"
    world.resolver.records["odd.example", kind] = [address]
    assert await world.addresses("odd.example", kind) == []
    assert (await world.event(action="denied", name="odd.example")).reason == "rebinding"
    with refused(errno.ECONNREFUSED, errno.EACCES, errno.ENETUNREACH, errno.EINVAL, errno.ENETDOWN, errno.EHOSTUNREACH):
        await world.connect(address, 443)


async def test_a_name_that_leads_elsewhere_a_moment_later(world: Lab) -> None:
    world.resolver.records["moment.example", "A"] = [THIRD]

    def at_once(response: dns.message.Message) -> None:
        for rrset in response.answer:
            rrset.ttl = 0

    world.resolver.rewrite = at_once
    answer = await world.lookup("moment.example")
    assert (answer.answer[0].ttl, str(answer.answer[0][0])) == (0, THIRD)
    world.resolver.records["moment.example", "A"] = [GATEWAY]
    assert await world.addresses("moment.example") == []
    assert (await world.event(action="denied", name="moment.example")).reason == "rebinding"
    with refused():
        await world.connect(GATEWAY, 8080)
    assert await world.talk(THIRD, 443, client_hello("moment.example")) == b"reply"


async def test_an_alias_that_leads_inside(world: Lab) -> None:
    records = world.resolver.records
    records["odd.example", "CNAME"], records["inside.example", "A"] = ["inside.example."], [GATEWAY]
    assert await world.addresses("odd.example") == []
    assert (await world.event(action="denied", name="odd.example")).reason == "rebinding"
    records["odd.example", "CNAME"], records["b.example", "CNAME"] = ["b.example."], ["c.example."]
    records["c.example", "A"] = [OTHER]
    assert await world.addresses("odd.example") == [OTHER]
    for name in ("b.example", "c.example"):
        with pytest.raises(ConnectionResetError):
            await world.talk(OTHER, 443, client_hello(name))
