"""Frames as a guest sends them, taken apart without trusting any length in them.

Ethernet II; ARP (RFC 826); IPv4 (RFC 791) and IPv6 (RFC 8200), neither with options nor fragments; TCP (RFC 9293), UDP
(RFC 768), ICMP (RFC 792, RFC 4443).
"""

from __future__ import annotations

import ipaddress
import struct

from attrs import frozen

from pykata.net.policy.addresses import Address

ARP, IPV4, IPV6, VLAN = 0x0806, 0x0800, 0x86DD, (0x8100, 0x88A8, 0x9100)
ICMP, TCP, UDP, ICMP6 = 1, 6, 17, 58
NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMP6: "icmp", 2: "igmp", 41: "6in4", 47: "gre", 50: "esp", 132: "sctp"}
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
BROADCAST = ipaddress.IPv4Address("255.255.255.255")
DONT_FRAGMENT = 0x4000
END, NOTHING = 0, 1                 # options of TCP without a length
PLAIN_OPTIONS = (2, 3, 4, 8)        # the largest segment, window scale, SACK permitted, timestamps
EXTENSIONS = {0: "hop-by-hop options", 43: "a routing header", 44: "a fragment", 60: "destination options",
              51: "an authentication header", 135: "a mobility header"}


class BadPacketError(ValueError):
    """A frame that no guest of ours has to send. ``reason`` is a word for it; it goes to wherever ``address`` is."""

    def __init__(self, reason: str, why: str, *, protocol: str = "", address: str = "") -> None:
        super().__init__(why)
        self.reason = reason
        self.protocol = protocol
        self.address = address


@frozen
class Arp:
    """An ARP packet for IPv4 over Ethernet."""

    sender_mac: bytes
    sender: bytes
    target: bytes


@frozen
class Packet:
    """An IP packet, its payload taken apart as far as it is TCP or UDP. ``frame`` is all of it."""

    frame: bytes
    version: int
    source: Address
    destination: Address
    protocol: int
    segment: bytes              # what follows the IP header: no padding of Ethernet's
    hops: int
    sport: int = 0
    dport: int = 0
    payload: bytes = b""        # of TCP and UDP
    seq: int = 0
    ack: int = 0
    flags: int = 0

    @property
    def name(self) -> str:
        """Of its protocol, in lower case."""
        return NAMES.get(self.protocol, f"ip-{self.protocol}")

    @property
    def to_many(self) -> bool:
        """Is its frame for a group of hosts, or all?"""
        return bool(self.frame[0] & 1)

    @property
    def is_for_many(self) -> bool:
        """Is it itself? Of the broadcast address of a network that can't be seen."""
        return self.destination.is_multicast or self.destination == BROADCAST

    @property
    def length(self) -> int:
        """What it takes of TCP's sequence numbers."""
        return len(self.payload) + bool(self.flags & SYN) + bool(self.flags & FIN)


def macs(frame: bytes) -> tuple[bytes, bytes, int]:
    """Destination, source and EtherType. Raises BadPacketError."""
    if len(frame) < 14:
        raise BadPacketError("malformed", f"a frame of {len(frame)} bytes")
    return frame[:6], frame[6:12], int.from_bytes(frame[12:14])


def arp(frame: bytes) -> Arp:
    """What is in an ARP frame. Raises BadPacketError."""
    body = frame[14:42]
    if len(body) < 28 or struct.unpack_from("!HHBB", body) != (1, IPV4, 6, 4):
        raise BadPacketError("malformed", "ARP that isn't about IPv4 over Ethernet", protocol="arp")
    return Arp(body[8:14], body[14:18], body[24:28])


def packet(frame: bytes) -> Packet:
    """What is in an IP frame. Raises BadPacketError."""
    kind = int.from_bytes(frame[12:14])
    if kind == IPV4:
        return _ip4(frame)
    if kind == IPV6:
        return _ip6(frame)
    if kind in VLAN:
        raise BadPacketError("vlan", "a VLAN tag", protocol="vlan")
    raise BadPacketError("protocol", f"EtherType {kind:#06x}", protocol=f"ether-{kind:04x}")


def _ip4(frame: bytes) -> Packet:
    body = frame[14:]
    if len(body) < 20:
        raise BadPacketError("malformed", "an IPv4 header that is cut off", protocol="ip")
    first, _, total, _, fragment, hops, protocol, source, destination = struct.unpack_from("!BBHHHBBxx4s4s", body)
    to = ipaddress.IPv4Address(destination)
    named = {"protocol": NAMES.get(protocol, f"ip-{protocol}"), "address": str(to)}
    if first >> 4 != 4 or first & 15 < 5 or not 20 <= total <= len(body):
        raise BadPacketError("malformed", "an IPv4 header that contradicts itself", **named)
    if first & 15 != 5:
        raise BadPacketError("options", "IP options", **named)
    if fragment & ~DONT_FRAGMENT:
        raise BadPacketError("fragment", "a fragment of an IP packet", **named)
    if checksum(body[:20]):
        raise BadPacketError("malformed", "a wrong checksum of IPv4", **named)
    return _payload(frame, 4, ipaddress.IPv4Address(source), to, protocol, body[20:total], hops)


def _ip6(frame: bytes) -> Packet:
    body = frame[14:]
    if len(body) < 40 or body[0] >> 4 != 6:
        raise BadPacketError("malformed", "an IPv6 header that is cut off", protocol="ip6")
    length, protocol, hops, source, destination = struct.unpack_from("!HBB16s16s", body, 4)
    to = ipaddress.IPv6Address(destination)
    named = {"protocol": NAMES.get(protocol, f"ip-{protocol}"), "address": str(to)}
    if len(body) < 40 + length:
        raise BadPacketError("malformed", "an IPv6 packet that is cut off", **named)
    if protocol in EXTENSIONS:
        named["protocol"] = "ip6"
        raise BadPacketError("fragment" if protocol == 44 else "options", f"IPv6 with {EXTENSIONS[protocol]}", **named)
    return _payload(frame, 6, ipaddress.IPv6Address(source), to, protocol, body[40 : 40 + length], hops)


def _payload(
    frame: bytes, version: int, source: Address, destination: Address, protocol: int, segment: bytes, hops: int
) -> Packet:
    if protocol not in (TCP, UDP):
        return Packet(frame, version, source, destination, protocol, segment, hops)
    named = {"protocol": NAMES[protocol], "address": str(destination)}
    if protocol == UDP:
        if len(segment) < 8 or not 8 <= int.from_bytes(segment[4:6]) <= len(segment):
            raise BadPacketError("malformed", "a UDP header that contradicts itself", **named)
        sport, dport, length, check = struct.unpack_from("!HHHH", segment)
        if (check or version == 6) and checksum(pseudo(source, destination, protocol, length) + segment[:length]):
            raise BadPacketError("malformed", "a wrong checksum of UDP", **named)
        return Packet(frame, version, source, destination, protocol, segment, hops, sport, dport, segment[8:length])
    if len(segment) < 20 or not 20 <= (start := (segment[12] >> 4) * 4) <= len(segment):
        raise BadPacketError("malformed", "a TCP header that contradicts itself", **named)
    if checksum(pseudo(source, destination, protocol, len(segment)) + segment):
        raise BadPacketError("malformed", "a wrong checksum of TCP", **named)
    sport, dport, seq, ack = struct.unpack_from("!HHII", segment)
    return Packet(
        frame, version, source, destination, protocol, segment, hops, sport, dport, segment[start:], seq, ack,
        segment[13],
    )  # fmt: skip


def plain_syn(syn: Packet) -> bytes:
    """The frame of a SYN without those options by which a server would read other bytes than are sent, or earlier.

    Such as Multipath TCP, which numbers them anew (RFC 8684), TCP Fast Open (RFC 7413), and encryption (RFC 8547).
    """
    head = bytearray(syn.segment[:20])
    options = _plain_options(syn.segment[20 : (syn.segment[12] >> 4) * 4])
    if options == syn.segment[20 : 20 + len(options)]:
        return syn.frame
    head[16:18] = bytes(2)
    head += options
    head[16:18] = checksum(pseudo(syn.source, syn.destination, TCP, len(head)) + head).to_bytes(2)
    start = 14 + (20 if syn.version == 4 else 40)
    return syn.frame[:start] + head + syn.frame[start + len(syn.segment) :]


def _plain_options(options: bytes) -> bytes:
    plain, at = bytearray(), 0
    while at < len(options) and options[at] != END:
        length = 1 if options[at] == NOTHING else options[at + 1] if at + 1 < len(options) else 0
        if length < 1 or at + length > len(options) or (length == 1 and options[at] != NOTHING):
            break       # what follows can't be read
        plain += options[at : at + length] if options[at] in PLAIN_OPTIONS else bytes((NOTHING,)) * length
        at += length
    return bytes(plain) + bytes(len(options) - len(plain))


def pseudo(source: Address, destination: Address, protocol: int, length: int) -> bytes:
    """The header that checksums cover beside the segment."""
    if source.version == 4:
        return source.packed + destination.packed + struct.pack("!BBH", 0, protocol, length)
    return source.packed + destination.packed + struct.pack("!IxxxB", length, protocol)


def checksum(data: bytes) -> int:
    """The internet's (RFC 1071): 0 for data that holds its own right one."""
    if len(data) % 2:
        data += b"\0"
    # 2^16 is 1 modulo 65535, so the sum of the 16-bit words is the whole number modulo 65535.
    total = int.from_bytes(data) % 0xFFFF
    # 0 and 0xFFFF are the same there; only of zeros alone is the sum 0.
    total = 0xFFFF if total == 0 and any(data) else total
    return total ^ 0xFFFF
