"""Frames that we make: what tells a guest at once that it can't get there, and the answers of DNS."""

from __future__ import annotations

import struct

from pykata.net.policy.packets import ACK, ICMP, ICMP6, IPV4, IPV6, RST, TCP, UDP, Packet, checksum, pseudo

HOPS = 64
PROHIBITED = (3, 13)        # destination unreachable, communication administratively prohibited (RFC 1812, 5.2.7.1)
PROHIBITED6 = (1, 1)        # (RFC 4443, 3.1)
QUOTED = 512                # bytes of the packet in question


def reset(to: Packet) -> bytes | None:
    """The RST that answers a segment (RFC 9293, 3.10.7.1); none answers another RST."""
    if to.flags & RST:
        return None
    if to.flags & ACK:
        return _tcp(to, to.ack, 0, RST)
    return _tcp(to, 0, to.seq + to.length, RST | ACK)


def reset_onward(of: Packet) -> bytes:
    """The RST with which the guest's end of a connection leaves it, where the segment would have been."""
    source, destination = of.source, of.destination
    segment = _segment(of.sport, of.dport, of.seq, of.ack, RST | ACK)
    return _ip(of.frame[:6], of.frame[6:12], of.version, source.packed, destination.packed, TCP,
               _summed(segment, 16, pseudo(source, destination, TCP, len(segment))))


def prohibited(to: Packet) -> bytes:
    """The ICMP error that says that a packet was dropped on purpose."""
    head = struct.calcsize("!20s") if to.version == 4 else 40
    quoted = to.frame[14 : 14 + head + min(len(to.segment), QUOTED)]
    if to.version == 4:
        body = struct.pack("!BBHI", *PROHIBITED, 0, 0) + quoted
        return _back(to, ICMP, _summed(body, 2, b""))
    body = struct.pack("!BBHI", *PROHIBITED6, 0, 0) + quoted
    return _back(to, ICMP6, _summed(body, 2, pseudo(to.destination, to.source, ICMP6, len(body))))


def datagram(to: Packet, payload: bytes) -> bytes:
    """The answer to a UDP packet."""
    body = struct.pack("!HHHH", to.dport, to.sport, 8 + len(payload), 0) + payload
    return _back(to, UDP, _summed(body, 6, pseudo(to.destination, to.source, UDP, len(body)), zero=0xFFFF))


def _tcp(to: Packet, seq: int, ack: int, flags: int) -> bytes:
    body = _segment(to.dport, to.sport, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, flags)
    return _back(to, TCP, _summed(body, 16, pseudo(to.destination, to.source, TCP, len(body))))


def _segment(sport: int, dport: int, seq: int, ack: int, flags: int) -> bytes:
    return struct.pack("!HHIIBBHHH", sport, dport, seq, ack, 5 << 4, flags, 0, 0, 0)


def _summed(body: bytes, at: int, pseudo_header: bytes, *, zero: int = 0) -> bytes:
    return body[:at] + struct.pack("!H", checksum(pseudo_header + body) or zero) + body[at + 2 :]


def _back(to: Packet, protocol: int, body: bytes) -> bytes:
    return _ip(to.frame[6:12], to.frame[:6], to.version, to.destination.packed, to.source.packed, protocol, body)


def _ip(
    to_mac: bytes, from_mac: bytes, version: int, source: bytes, destination: bytes, protocol: int, body: bytes
) -> bytes:
    if from_mac[0] & 1:
        from_mac = bytes((0x02, *from_mac[1:]))     # nobody sends from a group's address
    if version == 6:
        head = struct.pack("!IHBB16s16s", 6 << 28, len(body), protocol, HOPS, source, destination)
        return to_mac + from_mac + struct.pack("!H", IPV6) + head + body
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, HOPS, protocol, 0, source, destination)
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return to_mac + from_mac + struct.pack("!H", IPV4) + head + body
