"""Frames as no kernel would send them, for tests of what looks at frames."""

from __future__ import annotations

import ipaddress
import struct

from pykata.net.policy.packets import checksum, pseudo

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32


def ethernet(kind: int, payload: bytes, *, source: str, destination: str) -> bytes:
    """An Ethernet II frame."""
    return mac(destination) + mac(source) + struct.pack("!H", kind) + payload


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ip4(
    source: str, destination: str, protocol: int, payload: bytes, *, options: bytes = b"", fragment: int = 0,
    ttl: int = 64,
) -> bytes:  # fmt: skip
    """An IPv4 packet; ``fragment`` is the field with flags and offset."""
    words = 5 + len(options) // 4
    head = struct.pack(
        "!BBHHHBBH4s4s", 4 << 4 | words, 0, words * 4 + len(payload), 7, fragment, ttl, protocol, 0,
        ipaddress.IPv4Address(source).packed, ipaddress.IPv4Address(destination).packed,
    ) + options  # fmt: skip
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def ip6(source: str, destination: str, protocol: int, payload: bytes, *, hops: int = 64) -> bytes:
    """An IPv6 packet."""
    return struct.pack(
        "!IHBB16s16s", 6 << 28, len(payload), protocol, hops, ipaddress.IPv6Address(source).packed,
        ipaddress.IPv6Address(destination).packed,
    ) + payload  # fmt: skip


def tcp(
    source: str, destination: str, sport: int, dport: int, *, flags: int, seq: int = 0, ack: int = 0,
    payload: bytes = b"", options: bytes = b"", urgent: int = 0,
) -> bytes:  # fmt: skip
    """A TCP segment with the right checksum."""
    body = struct.pack("!HHIIBBHHH", sport, dport, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, (5 + len(options) // 4) << 4,
                       flags, 65535, 0, urgent) + options + payload
    return _summed(source, destination, TCP, body, 16)


def udp(source: str, destination: str, sport: int, dport: int, payload: bytes) -> bytes:
    """A UDP datagram with the right checksum."""
    body = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    return _summed(source, destination, UDP, body, 6)


def icmp6(source: str, destination: str, body: bytes) -> bytes:
    """An ICMPv6 message, whose checksum is at its place and 0."""
    return _summed(source, destination, ICMP6, body, 2)


def icmp(kind: int, payload: bytes) -> bytes:
    """An ICMP message."""
    body = struct.pack("!BBHI", kind, 0, 0, 1) + payload
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def arp(operation: int, sender_mac: str, sender: str, target: str) -> bytes:
    """An ARP packet."""
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + mac(sender_mac) + \
        ipaddress.IPv4Address(sender).packed + bytes(6) + ipaddress.IPv4Address(target).packed


def _summed(source: str, destination: str, protocol: int, body: bytes, at: int) -> bytes:
    head = pseudo(ipaddress.ip_address(source), ipaddress.ip_address(destination), protocol, len(body))
    return body[:at] + struct.pack("!H", checksum(head + body)) + body[at + 2 :]
