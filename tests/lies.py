"""Frames that a guest has no business to send, and the reason for which each is refused."""

from __future__ import annotations

import ipaddress
import struct

from attrs import frozen

from pykata.net.policy.chain import link_local
from tests import frames
from tests.frames import ICMP6, SYN, TCP, UDP, ethernet, ip4, ip6
from tests.netlab import GATEWAY, GATEWAY6, GATEWAY_MAC, GOOD, GOOD6, GUEST, GUEST6, MAC, NEIGHBOUR, OTHER

IPV4, IPV6, ARP = 0x0800, 0x86DD, 0x0806
ANY, ALL = str(ipaddress.IPv4Address(0)), "255.255.255.255"
ROUTE = b"\x83\x07\x04" + ipaddress.IPv4Address(OTHER).packed + b"\0"


@frozen(kw_only=True)
class Who:
    """A guest and who is around it."""

    mac: str = MAC
    guest: str = GUEST
    guest6: str = GUEST6
    gateway: str = GATEWAY
    gateway6: str = GATEWAY6
    gateway_mac: str = GATEWAY_MAC
    neighbour: str = NEIGHBOUR
    neighbour6: str = "fd81:7::3"

    @property
    def link(self) -> str:
        """The guest's address of its link."""
        return link_local(self.mac)

    def frame(self, payload: bytes, *, source: str = "", kind: int = IPV4) -> bytes:
        return ethernet(kind, payload, source=source or self.mac, destination=self.gateway_mac)

    def syn(self, source: str = "", destination: str = GOOD) -> bytes:
        return frames.tcp(source or self.guest, destination, 5003, 443, flags=SYN)

    def nd(self, source: str, body: bytes) -> bytes:
        message = frames.icmp6(source, "ff02::1", body)
        return self.frame(ip6(source, "ff02::1", ICMP6, message, hops=255), kind=IPV6)

    def extended(self, header: int, extension: bytes) -> bytes:
        return self.frame(ip6(self.guest6, GOOD6, header, extension + self.syn(self.guest6, GOOD6)), kind=IPV6)

    def datagram(self, source: str, destination: str, port: int) -> bytes:
        return self.frame(ip4(source, destination, UDP, frames.udp(source, destination, port, port, bytes(40))))


def spoofed(who: Who) -> dict[str, tuple[bytes, str]]:
    """By what is wrong with them."""
    return {
        "another who.mac": (who.frame(ip4(who.guest, GOOD, TCP, who.syn()), source="02:00:00:00:00:99"), "spoofed"),
        "another address": (who.frame(ip4(who.neighbour, GOOD, TCP, who.syn(who.neighbour))), "spoofed"),
        "the gateway's address": (who.frame(ip4(who.gateway, GOOD, TCP, who.syn(who.gateway))), "spoofed"),
        "another IPv6 address": (
            who.frame(ip6(who.neighbour6, GOOD6, TCP, who.syn(who.neighbour6, GOOD6)), kind=IPV6), "spoofed",
        ),
        "ARP for the gateway": (who.frame(frames.arp(2, who.mac, who.gateway, who.guest), kind=ARP), "spoofed"),
        "ARP with another who.mac": (
            who.frame(frames.arp(2, "02:00:00:00:00:99", who.guest, who.gateway), kind=ARP), "spoofed",
        ),
        "a fragment": (who.frame(ip4(who.guest, GOOD, TCP, who.syn(), fragment=0x2000)), "fragment"),
        "a later fragment": (who.frame(ip4(who.guest, GOOD, TCP, b"data of a fragment" * 4, fragment=4)), "fragment"),
        "a tiny first fragment": (who.frame(ip4(who.guest, GOOD, TCP, who.syn()[:8], fragment=0x2000)), "fragment"),
        "the rest of it": (who.frame(ip4(who.guest, GOOD, TCP, who.syn()[8:], fragment=1)), "fragment"),
        "the bit that means evil": (who.frame(ip4(who.guest, GOOD, TCP, who.syn(), fragment=0x8000)), "fragment"),
        "source routing": (who.frame(ip4(who.guest, GOOD, TCP, who.syn(), options=ROUTE)), "options"),
        "a VLAN": (who.frame(struct.pack("!HH", 7, IPV4) + ip4(who.guest, GOOD, TCP, who.syn()), kind=0x8100), "vlan"),
        "two VLANs": (
            who.frame(struct.pack("!HHHH", 7, 0x8100, 7, IPV4) + ip4(who.guest, GOOD, TCP, who.syn()), kind=0x88A8),
            "vlan",
        ),
        "a router advertisement": (who.nd(who.link, b"\x86" + bytes(15)), "router"),
        "a neighbour that it isn't": (
            who.nd(who.guest6, b"\x88\0\0\0\x20\0\0\0" + ipaddress.IPv6Address(who.gateway6).packed + b"\2\1"
                   + frames.mac(who.mac)),
            "spoofed",
        ),
        "IPv6 options": (who.extended(0, b"\x06\0\x01\x04\0\0\0\0"), "options"),
        "an IPv6 fragment": (who.extended(44, b"\x06\0\0\x01\0\0\0\x01"), "fragment"),
        "an IPv6 fragment that is whole": (who.extended(44, b"\x06\0\0\0\0\0\0\1"), "fragment"),
        "IPv6 destination options": (who.extended(60, b"\x06\0\x01\x04\0\0\0\0"), "options"),
        "segment routing": (
            who.extended(43, b"\x06\x02\x04\x01\0\0\0\0" + ipaddress.IPv6Address(GOOD6).packed), "options",
        ),
        "authentication": (who.extended(51, b"\x06\x04" + bytes(22)), "options"),
        "nothing behind IPv6": (who.frame(ip6(who.guest6, GOOD6, 59, b"data in nothing"), kind=IPV6), "protocol"),
        "IPv4 in IPv4": (
            who.frame(ip4(who.guest, GOOD, 4, ip4(who.guest, OTHER, TCP, who.syn(destination=OTHER)))), "protocol",
        ),
        "IPv4 in IPv6": (
            who.frame(ip6(who.guest6, GOOD6, 4, ip4(who.guest, OTHER, TCP, who.syn(destination=OTHER))), kind=IPV6),
            "protocol",
        ),
        "an ICMP redirect": (who.frame(ip4(who.guest, GOOD, frames.ICMP, frames.icmp(5, bytes(28)))), "protocol"),
        "a redirect of IPv6": (who.nd(who.link, b"\x89" + bytes(39)), "router"),
        "a question whether another has its own address": (
            who.nd("::", b"\x87\0\0\0\0\0\0\0" + ipaddress.IPv6Address(who.gateway6).packed), "spoofed",
        ),
        "ARP with more in it": (
            who.frame(frames.arp(1, who.mac, who.guest, who.gateway) + b"data" * 100, kind=ARP), "malformed",
        ),
        "a frame for all with a packet for one": (
            ethernet(IPV4, ip4(who.guest, GOOD, TCP, who.syn()), source=who.mac, destination="ff:ff:ff:ff:ff:ff"),
            "malformed",
        ),
        "PPP": (who.frame(b"\x11\0\0\1\0\x16\0\x21" + ip4(who.guest, GOOD, TCP, who.syn()), kind=0x8864), "protocol"),
        "MPLS": (who.frame(b"\0\0\x11\xff" + ip4(who.guest, GOOD, TCP, who.syn()), kind=0x8847), "protocol"),
        "a jumbogram": (who.extended(0, b"\x06\0\xc2\x04\0\1\0\0"), "options"),
        "LLMNR": (who.datagram(who.guest, "224.0.0.252", 5355), "protected"),
        "IPv6 source routing": (who.extended(43, b"\x06\x02\0\x01" + bytes(20)), "options"),
        "mDNS": (who.datagram(who.guest, "224.0.0.251", 5353), "protected"),
        "DHCP": (who.datagram(ANY, ALL, 68), "spoofed"),
        "broadcast": (who.datagram(who.guest, ALL, 68), "protected"),
        "another EtherType": (who.frame(b"spanning tree" * 5, kind=0x88CC), "protocol"),
        "802.3": (who.frame(b"\x42\x42\x03" + bytes(40), kind=43), "protocol"),
        "a cut header": (who.frame(b"\x45\0\0\x14"), "malformed"),
        "IPv6 as IPv4": (who.frame(ip6(who.guest6, GOOD6, TCP, who.syn(who.guest6, GOOD6))), "malformed"),
    }  # fmt: skip


def frame(payload: bytes, *, kind: int = IPV4) -> bytes:
    """One of the guest of a :class:`~tests.netlab.Lab`."""
    return Who().frame(payload, kind=kind)


SPOOFED = spoofed(Who())
