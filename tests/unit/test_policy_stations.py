"""Who is where around a guest: what is believed, and how much of it is remembered."""

from __future__ import annotations

import ipaddress
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata.net.policy.actions import Actions, Guest
from pykata.net.policy.addresses import Address
from pykata.net.policy.packets import BadPacketError, packet
from pykata.net.policy.stations import MOST, MOST_EACH, MOST_ROUTERS, Stations
from tests import frames
from tests.frames import ICMP6, UDP, ethernet, ip4, ip6
from tests.lies import ARP, IPV4, IPV6

MAC, ROUTER, OTHER, LIAR = (f"02:00:00:00:00:{each:02x}" for each in range(1, 5))
GUEST, GATEWAY, NEAR, FAR = "10.0.0.2", "10.0.0.1", "10.0.0.9", "20.0.0.1"
GUEST6, NEAR6, FAR6, LINK6 = "fd00::2", "fd00::9", "2a00::1", "fe80::1"


class Admitted:
    """What the kernel lets pass."""

    def __init__(self) -> None:
        self.now: list[tuple[bytes, Address | None]] = []

    def admit(self, mac: bytes, address: Address | None) -> None:
        self.now.append((mac, address))

    def dismiss(self, mac: bytes, address: Address | None) -> None:
        self.now.remove((mac, address))


def around(*, fixed: dict[str, str] | None = None) -> tuple[Stations, Admitted]:
    does = Admitted()
    own = tuple(ipaddress.ip_address(each) for each in (GUEST, GUEST6))
    neighbours = {ipaddress.ip_address(each): frames.mac(mac) for each, mac in (fixed or {}).items()}
    guest = Guest(frames.mac(MAC), own, (), (ipaddress.ip_address(GATEWAY),), neighbours)
    return Stations(guest, cast(Actions, does)), does


def said(address: str, mac: str, told: str = GUEST) -> bytes:
    return ethernet(ARP, frames.arp(2, mac, address, told), source=mac, destination=MAC)


def nd(kind: int, body: bytes, source: str, told: str = GUEST6, *, mac: str = OTHER, hops: int = 255) -> bytes:
    message = frames.icmp6(source, told, bytes((kind, 0, 0, 0)) + body)
    return ethernet(IPV6, ip6(source, told, ICMP6, message, hops=hops), source=mac, destination=MAC)


def about(address: str) -> bytes:
    """An advertisement's flags, and its target."""
    return bytes(4) + ipaddress.IPv6Address(address).packed


def goes(stations: Stations, destination: str, mac: str) -> bool:
    source, kind, make = (GUEST, IPV4, ip4) if "." in destination else (GUEST6, IPV6, ip6)
    body = make(source, destination, UDP, frames.udp(source, destination, 5000, 9000, b""))
    try:
        stations.check(packet(ethernet(kind, body, source=MAC, destination=mac)))
    except BadPacketError:
        return False
    return True


def test_who_answers_has_its_address_and_a_gateway_leads_anywhere() -> None:
    stations, does = around()
    assert not goes(stations, NEAR, OTHER)
    assert stations.heard(said(NEAR, OTHER))
    assert stations.heard(said(GATEWAY, ROUTER))
    assert goes(stations, NEAR, OTHER)
    assert not goes(stations, FAR, OTHER)
    assert not goes(stations, NEAR, LIAR)
    for to in (NEAR, FAR, FAR6):
        assert goes(stations, to, ROUTER)
    assert does.now == [(frames.mac(ROUTER), None), (frames.mac(OTHER), ipaddress.ip_address(NEAR))]


def test_who_asks_for_others_is_nobody_new_and_who_is_known_may_move() -> None:
    stations, _ = around()
    stations.heard(said(NEAR, OTHER, told=FAR))
    assert not goes(stations, NEAR, OTHER)
    stations.heard(said(NEAR, OTHER))
    stations.heard(said(NEAR, LIAR, told=NEAR))         # gratuitous: it says so to all
    assert goes(stations, NEAR, LIAR)
    assert goes(stations, NEAR, OTHER)                  # what is under way


def test_what_is_known_from_the_start_stays() -> None:
    stations, _ = around(fixed={GATEWAY: ROUTER})
    assert goes(stations, FAR, ROUTER)
    stations.heard(said(GATEWAY, LIAR))
    assert not goes(stations, FAR, LIAR)
    assert not goes(stations, GATEWAY, LIAR)


@pytest.mark.parametrize("frame", [
    nd(136, about(NEAR6) + b"\2\1" + frames.mac(OTHER), NEAR6),
    nd(136, about(NEAR6) + b"\x0e\1" + bytes(6) + b"\2\1" + frames.mac(OTHER), LINK6, mac=LIAR),
    nd(136, about(NEAR6), NEAR6),
    nd(135, about(GUEST6) + b"\1\1" + frames.mac(OTHER), NEAR6),
])  # fmt: skip
def test_neighbours_of_ipv6_are_learned(frame: bytes) -> None:
    stations, _ = around()
    assert stations.heard(frame)
    assert goes(stations, NEAR6, OTHER)
    assert not goes(stations, NEAR6, LIAR)
    assert not goes(stations, FAR6, OTHER)


def test_who_advertises_itself_as_a_router_is_one() -> None:
    stations, _ = around()
    assert stations.heard(nd(134, bytes(12), LINK6, "ff02::1", mac=ROUTER))
    assert goes(stations, FAR6, ROUTER)


@pytest.mark.parametrize("frame", [
    nd(136, about(NEAR6), NEAR6, hops=254), nd(136, bytes(8), NEAR6), nd(128, about(NEAR6), NEAR6), b"", bytes(14),
    ethernet(ARP, bytes(8), source=OTHER, destination=MAC),
])  # fmt: skip
def test_what_is_about_something_else_is_left_to_others(frame: bytes) -> None:
    stations, does = around()
    assert not stations.heard(frame)
    assert does.now == []


def test_nobody_has_the_mac_of_a_group_or_the_address_of_nobody() -> None:
    stations, _ = around()
    stations.heard(said(NEAR, "01:00:5e:00:00:01"))
    stations.heard(said(str(ipaddress.IPv4Address(0)), OTHER))
    assert not goes(stations, NEAR, "01:00:5e:00:00:01")
    assert not goes(stations, str(ipaddress.IPv4Address(0)), OTHER)


def test_what_is_remembered_has_an_end() -> None:
    stations, does = around()
    for number in range(MOST + 10):
        address = str(ipaddress.IPv4Address(0x0A010000 + number))
        stations.heard(said(address, OTHER))
        assert goes(stations, address, OTHER)
    for number in range(MOST_EACH + MOST_ROUTERS + 10):
        stations.heard(said(GATEWAY, f"02:00:00:00:01:{number:02x}"))
    assert len(does.now) <= MOST + MOST_EACH + MOST_ROUTERS
    assert len(set(does.now)) == len(does.now)
    assert not goes(stations, "10.1.0.0", OTHER)


def test_routers_that_come_and_come_displace_nobody_who_was_there_before() -> None:
    stations, does = around(fixed={GATEWAY: ROUTER, NEAR: OTHER})
    for number in range(MOST + MOST_ROUTERS):
        router, mac = f"fe80::1:{number:x}", f"02:00:00:01:{number >> 8:02x}:{number & 255:02x}"
        stations.heard(nd(134, bytes(12), router, "ff02::1", mac=mac))
    assert goes(stations, FAR, ROUTER)
    assert goes(stations, NEAR, OTHER)
    assert len(stations._gateways) <= 1 + MOST_ROUTERS
    assert len(does.now) <= 2 * MOST_ROUTERS + 4


@given(st.binary(max_size=120))
def test_nothing_that_is_sent_breaks_it(body: bytes) -> None:
    stations, _ = around()
    for kind in (ARP, IPV6):
        stations.heard(ethernet(kind, body, source=OTHER, destination=MAC))
    stations.heard(nd(136, body, NEAR6))
    stations.heard(nd(134, body, NEAR6))
