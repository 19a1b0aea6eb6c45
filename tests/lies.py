"""Frames that a guest has no business to send, and the reason for which each is refused."""

from __future__ import annotations

import ipaddress
import struct

from tests import frames
from tests.frames import ICMP6, SYN, TCP, UDP, ethernet, ip4, ip6
from tests.netlab import GATEWAY, GATEWAY6, GATEWAY_MAC, GOOD, GOOD6, GUEST, GUEST6, MAC, NEIGHBOUR, OTHER

IPV4, IPV6, ARP = 0x0800, 0x86DD, 0x0806
NEIGHBOUR6 = "fd81:7::3"


def frame(payload: bytes, *, source: str = MAC, kind: int = IPV4) -> bytes:
    return ethernet(kind, payload, source=source, destination=GATEWAY_MAC)


def syn(source: str = GUEST, destination: str = GOOD) -> bytes:
    return frames.tcp(source, destination, 5003, 443, flags=SYN)


def nd(source: str, body: bytes) -> bytes:
    return frame(ip6(source, "ff02::1", ICMP6, frames.icmp6(source, "ff02::1", body), hops=255), kind=IPV6)


def extended(header: int, extension: bytes) -> bytes:
    return frame(ip6(GUEST6, GOOD6, header, extension + syn(GUEST6, GOOD6)), kind=IPV6)


def datagram(source: str, destination: str, port: int) -> bytes:
    return frame(ip4(source, destination, UDP, frames.udp(source, destination, port, port, bytes(40))))


ANY, ALL, LINK = str(ipaddress.IPv4Address(0)), "255.255.255.255", "fe80::ff:fe00:2"
ROUTE = b"\x83\x07\x04" + ipaddress.IPv4Address(OTHER).packed + b"\0"
SPOOFED = {
    "another MAC": (frame(ip4(GUEST, GOOD, TCP, syn()), source="02:00:00:00:00:99"), "spoofed"),
    "another address": (frame(ip4(NEIGHBOUR, GOOD, TCP, syn(NEIGHBOUR))), "spoofed"),
    "the gateway's address": (frame(ip4(GATEWAY, GOOD, TCP, syn(GATEWAY))), "spoofed"),
    "another IPv6 address": (frame(ip6(NEIGHBOUR6, GOOD6, TCP, syn(NEIGHBOUR6, GOOD6)), kind=IPV6), "spoofed"),
    "ARP for the gateway": (frame(frames.arp(2, MAC, GATEWAY, GUEST), kind=ARP), "spoofed"),
    "ARP with another MAC": (frame(frames.arp(2, "02:00:00:00:00:99", GUEST, GATEWAY), kind=ARP), "spoofed"),
    "a fragment": (frame(ip4(GUEST, GOOD, TCP, syn(), fragment=0x2000)), "fragment"),
    "a later fragment": (frame(ip4(GUEST, GOOD, TCP, b"data of a fragment" * 4, fragment=4)), "fragment"),
    "a tiny first fragment": (frame(ip4(GUEST, GOOD, TCP, syn()[:8], fragment=0x2000)), "fragment"),
    "the rest of it": (frame(ip4(GUEST, GOOD, TCP, syn()[8:], fragment=1)), "fragment"),
    "the bit that means evil": (frame(ip4(GUEST, GOOD, TCP, syn(), fragment=0x8000)), "fragment"),
    "source routing": (frame(ip4(GUEST, GOOD, TCP, syn(), options=ROUTE)), "options"),
    "a VLAN": (frame(struct.pack("!HH", 7, IPV4) + ip4(GUEST, GOOD, TCP, syn()), kind=0x8100), "vlan"),
    "two VLANs": (
        frame(struct.pack("!HHHH", 7, 0x8100, 7, IPV4) + ip4(GUEST, GOOD, TCP, syn()), kind=0x88A8), "vlan",
    ),
    "a router advertisement": (nd(LINK, b"\x86" + bytes(15)), "router"),
    "a neighbour that it isn't": (
        nd(GUEST6, b"\x88\0\0\0\x20\0\0\0" + ipaddress.IPv6Address(GATEWAY6).packed + b"\2\1" + frames.mac(MAC)),
        "spoofed",
    ),
    "IPv6 options": (extended(0, b"\x06\0\x01\x04\0\0\0\0"), "options"),
    "an IPv6 fragment": (extended(44, b"\x06\0\0\x01\0\0\0\x01"), "fragment"),
    "an IPv6 fragment that is whole": (extended(44, b"\x06\0\0\0\0\0\0\1"), "fragment"),
    "IPv6 destination options": (extended(60, b"\x06\0\x01\x04\0\0\0\0"), "options"),
    "segment routing": (extended(43, b"\x06\x02\x04\x01\0\0\0\0" + ipaddress.IPv6Address(GOOD6).packed), "options"),
    "authentication": (extended(51, b"\x06\x04" + bytes(22)), "options"),
    "nothing behind IPv6": (frame(ip6(GUEST6, GOOD6, 59, b"data in nothing"), kind=IPV6), "protocol"),
    "IPv4 in IPv4": (frame(ip4(GUEST, GOOD, 4, ip4(GUEST, OTHER, TCP, syn(destination=OTHER)))), "protocol"),
    "IPv4 in IPv6": (
        frame(ip6(GUEST6, GOOD6, 4, ip4(GUEST, OTHER, TCP, syn(destination=OTHER))), kind=IPV6), "protocol",
    ),
    "an ICMP redirect": (frame(ip4(GUEST, GOOD, frames.ICMP, frames.icmp(5, bytes(28)))), "protocol"),
    "a redirect of IPv6": (nd(LINK, b"\x89" + bytes(39)), "router"),
    "a question whether another has its own address": (
        nd("::", b"\x87\0\0\0\0\0\0\0" + ipaddress.IPv6Address(GATEWAY6).packed), "spoofed",
    ),
    "ARP with more in it": (frame(frames.arp(1, MAC, GUEST, GATEWAY) + b"data" * 100, kind=ARP), "malformed"),
    "a frame for all with a packet for one": (
        ethernet(IPV4, ip4(GUEST, GOOD, TCP, syn()), source=MAC, destination="ff:ff:ff:ff:ff:ff"), "malformed",
    ),
    "PPP": (frame(b"\x11\0\0\1\0\x16\0\x21" + ip4(GUEST, GOOD, TCP, syn()), kind=0x8864), "protocol"),
    "MPLS": (frame(b"\0\0\x11\xff" + ip4(GUEST, GOOD, TCP, syn()), kind=0x8847), "protocol"),
    "a jumbogram": (extended(0, b"\x06\0\xc2\x04\0\1\0\0"), "options"),
    "LLMNR": (datagram(GUEST, "224.0.0.252", 5355), "protected"),
    "IPv6 source routing": (extended(43, b"\x06\x02\0\x01" + bytes(20)), "options"),
    "mDNS": (datagram(GUEST, "224.0.0.251", 5353), "protected"),
    "DHCP": (datagram(ANY, ALL, 68), "spoofed"),
    "broadcast": (datagram(GUEST, ALL, 68), "protected"),
    "another EtherType": (frame(b"spanning tree" * 5, kind=0x88CC), "protocol"),
    "802.3": (frame(b"\x42\x42\x03" + bytes(40), kind=43), "protocol"),
    "a cut header": (frame(b"\x45\0\0\x14"), "malformed"),
    "IPv6 as IPv4": (frame(ip6(GUEST6, GOOD6, TCP, syn(GUEST6, GOOD6))), "malformed"),
}  # fmt: skip
