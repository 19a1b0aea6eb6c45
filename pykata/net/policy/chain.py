"""The nftables chains at a tap: what the kernel decides by itself, and what it asks us (nft(8), family netdev).

Only what is known to be right goes on; whatever else there is goes to the inspection device, as much of it as we can
look at, and nowhere else. So if nobody looks, nothing gets out that wasn't allowed before.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from attrs import frozen

from pykata.net.policy.addresses import Address
from pykata.net.policy.rules import Rate

MARK = 0x706B0001
"""Of frames that we send: neither do they need a decision, nor are they what others want of the guest."""

FLOWS = 8192                # of the kernel, each way; twice what we know of, for those that are being removed
REPLIES = 4096              # connections that others made to the guest
STATIONS = 8192             # around the guest; more than we remember
TCP_IDLE, UDP_IDLE, REPLY_IDLE, ECHO_IDLE = "5m", "60s", "1h", "10s"

# Packets in a second, and at once. Those that make us decide something; those that no proper guest sends; copies of
# what comes back on connections that we look at.
ASKED = "limit rate 3000/second burst 500 packets"
ODD = "limit rate 200/second burst 100 packets"
COPIED = "limit rate 3000/second burst 500 packets"
TOLD = "limit rate 1000/second burst 1000 packets"
"""Copies of what others say of themselves."""
ACCEPTED = "limit rate 3000/second burst 1000 packets"
"""Copies of what a server accepts a connection with: none of them may be lost among the others."""
RESOLUTION = "limit rate 100/second burst 100 packets"
"""ARP and ND."""
LARGEST_ARP = 46        # bytes behind the header of the shortest frame: what is more is nobody's business

V4 = ("4", "ip", "ipv4_addr", "ip protocol", "icmp type echo-request", "icmp type echo-reply")
V6 = ("6", "ip6", "ipv6_addr", "meta l4proto", "icmpv6 type echo-request", "icmpv6 type echo-reply")


@frozen
class Place:
    """A tap, and what a policy at it needs. All of them are names of devices of one namespace.

    What is allowed goes to the ``uplink``, or the way that it takes anyway (a bridge's) if that is empty.
    """

    table: str
    tap: str
    uplink: str
    inspection: str
    copies: str
    mac: str
    addresses: tuple[Address, ...]
    rate: Rate | None = None
    restricts: bool = True

    def of(self, version: int) -> list[str]:
        """The guest's addresses."""
        return [str(each) for each in self.addresses if each.version == version]


def ruleset(place: Place) -> str:
    """All of it as one transaction for ``nft -f -``."""
    return "\n".join((f"table netdev {place.table} {{", *_table(place), "}", ""))


def _table(place: Place) -> Iterator[str]:
    for one in (V4, V6):
        yield from _sets(one)
    yield f"set routers {{ type ether_addr; size {STATIONS}; }}"
    yield f"chain onward {{ {'fwd to ' + quoted(place.uplink) if place.uplink else 'accept'}; }}"
    yield f"chain inward {{ {'fwd to ' + quoted(place.tap) if place.uplink else 'accept'}; }}"
    yield f"chain ask {{ {ASKED} counter fwd to {quoted(place.inspection)}; counter drop; }}"
    yield f"chain odd {{ {ODD} counter fwd to {quoted(place.inspection)}; counter drop; }}"
    yield from _data_only()
    for one in (V4, V6):
        yield from _known(one)
    yield f'chain from_guest {{ type filter hook ingress device {quoted(place.tap)} priority 0; policy drop;'
    yield from _from_guest(place)
    yield "}"
    if place.uplink:
        # Not the egress hook of the tap: what tc redirects doesn't pass it.
        yield f'chain to_guest {{ type filter hook ingress device {quoted(place.uplink)} priority 0; policy drop;'
    else:
        yield f'chain to_guest {{ type filter hook egress device {quoted(place.tap)} priority 0; policy accept;'
        yield f"meta mark {MARK:#x} accept;"
    yield from _to_guest(place)
    yield "goto inward; }"


def _sets(one: tuple[str, ...]) -> Iterator[str]:
    number, _, address, *_ = one
    key = f"type inet_proto . {address} . {address} . inet_service . inet_service"
    for name, size in (("flows", FLOWS), ("replies", REPLIES)):
        yield f"set {name}{number} {{ {key}; size {size}; flags dynamic,timeout; }}"
    for name in ("read", "data"):
        yield f"set {name}{number} {{ {key}; size {FLOWS}; }}"
    yield f"set near{number} {{ type {address} . ether_addr; size {STATIONS}; }}"
    yield f"set echoes{number} {{ type {address} . {address}; size {REPLIES}; flags dynamic,timeout; }}"


def _data_only() -> Iterator[str]:
    """Segments without data go on: the whole packet is as long as its headers."""
    for number, length, plain in (("4", "ip length", 20), ("6", "ip6 length", 0)):
        yield f"chain empty{number} {{ tcp flags & (syn | fin | rst | urg) != 0 goto ask;"
        yield from (f"tcp doff {words} {length} {plain + 4 * words} goto onward;" for words in range(5, 16))
        yield "goto ask; }"


def _known(one: tuple[str, ...]) -> Iterator[str]:
    """Packets with the guest's addresses: those of connections that are granted go on, to where their addresses are."""
    number, ip, _, protocol, _, reply = one
    key = f"{protocol} . {ip} saddr . {ip} daddr . th dport . th sport"
    # Answers to who came to the guest: he may have come by another router.
    yield f"chain answers{number} {{"
    for kind in ("tcp", "udp"):
        match = f"meta l4proto {kind} {key} @replies{number}"
        yield f"{match} update @replies{number} {{ {key} timeout {REPLY_IDLE} }} goto onward;"
    yield f"{reply} {ip} saddr . {ip} daddr @echoes{number} goto onward;"
    yield "goto ask; }"
    yield f"chain granted{number} {{"
    for kind, idle in (("tcp", TCP_IDLE), ("udp", UDP_IDLE)):
        match = f"meta l4proto {kind} {key} @flows{number}"
        yield f"{match} update @flows{number} {{ {key} timeout {idle} }} goto onward;"
    yield f"meta l4proto tcp {key} @data{number} goto empty{number};"
    yield f"goto answers{number}; }}"
    yield f"chain known{number} {{"
    yield "tcp flags & (syn | ack) == syn goto ask;"
    yield f"ether daddr @routers goto granted{number};"
    yield f"{ip} daddr . ether daddr @near{number} goto granted{number};"
    yield f"goto answers{number}; }}"


def _from_guest(place: Place) -> Iterator[str]:
    if not place.uplink:
        yield f"meta mark {MARK:#x} accept;"
    yield from _packets_over(place.rate)
    if place.rate is not None and place.rate.bits_per_second is not None:
        yield f"{bytes_over(place.rate.bits_per_second)} drop;"
    if not place.restricts:
        yield "goto onward;"
        return
    yield f"ether saddr != {place.mac} goto odd;"
    yield "ether type { 0x8100, 0x88a8, 0x9100 } goto odd;"
    four, six = place.of(4), place.of(6)
    if four:
        addresses = "{ " + ", ".join(four) + " }"
        yield (
            f"ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 meta length <= {LARGEST_ARP} "
            f"arp saddr ether {place.mac} arp saddr ip {addresses} {RESOLUTION} goto onward;"
        )
    if six:
        yield from _neighbours(place, six)
    yield "ether type != arp ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 goto odd;"
    if four:
        # 0x45: no options. Neither an offset nor more fragments; the bit that is reserved (RFC 3514) isn't set.
        yield (
            f"ether type ip ip saddr {addresses} @nh,0,8 0x45 ip frag-off & 0xbfff == 0 "
            "ip daddr != 224.0.0.0/3 goto known4;"
        )
    if six:
        # The next header itself: what looks for that of TCP passes over those of extensions.
        yield (
            f"ether type ip6 ip6 saddr {{ {', '.join(six)} }} ip6 daddr != ff00::/8 "
            "ip6 nexthdr { tcp, udp, icmpv6 } goto known6;"
        )
    yield "goto odd;"


def _neighbours(place: Place, addresses: list[str]) -> Iterator[str]:
    """Solicitations and advertisements (RFC 4861, 4.3 and 4.4) that say of the guest what is so."""
    own = link_local(place.mac)
    mac = "0x" + place.mac.replace(":", "")
    sources = ", ".join((*addresses, own))
    targets = ", ".join(f"{int(ipaddress.IPv6Address(each)):#x}" for each in (*addresses, own))
    start = "ether type ip6 ip6 nexthdr icmpv6 ip6 hoplimit 255"
    # Whether somebody has its own address; asked of others', they would take it for that somebody (RFC 4862, 5.4.3).
    yield (
        f"{start} icmpv6 type nd-neighbor-solicit ip6 saddr :: ip6 length 24 @th,64,128 {{ {targets} }} "
        f"{RESOLUTION} goto onward;"
    )
    yield (
        f"{start} icmpv6 type nd-neighbor-solicit ip6 saddr {{ {sources} }} ip6 length 32 "
        f"@th,192,16 0x0101 @th,208,48 {mac} {RESOLUTION} goto onward;"
    )
    yield f"{start} icmpv6 type nd-neighbor-solicit ip6 saddr {{ {sources} }} ip6 length 24 {RESOLUTION} goto onward;"
    advert = f"{start} icmpv6 type nd-neighbor-advert ip6 saddr {{ {sources} }} @th,64,128 {{ {targets} }}"
    yield f"{advert} ip6 length 32 @th,192,16 0x0201 @th,208,48 {mac} {RESOLUTION} goto onward;"
    yield f"{advert} ip6 length 24 {RESOLUTION} goto onward;"


def _to_guest(place: Place) -> Iterator[str]:
    """Remember what others want of the guest: it may answer. Copy what says how far a connection is."""
    yield from _packets_over(place.rate)
    if not place.restricts:
        return
    yield from _told(place)
    for number, ip, _, protocol, request, _ in (V4, V6):
        kind = "ip" if ip == "ip" else "ip6"
        key = f"{protocol} . {ip} daddr . {ip} saddr . th sport . th dport"
        for flags, limit in (("==", ACCEPTED), ("!=", COPIED)):
            yield (
                f"ether type {kind} meta l4proto tcp tcp flags & (syn | ack) {flags} (syn | ack) "
                f"{key} @read{number} {limit} dup to {quoted(place.copies)};"
            )
        yield (
            f"ether type {kind} tcp flags & (syn | ack) == syn "
            f"update @replies{number} {{ {key} timeout {REPLY_IDLE} }} goto inward;"
        )
        yield f"ether type {kind} meta l4proto udp {key} @flows{number} goto inward;"
        yield f"ether type {kind} meta l4proto udp update @replies{number} {{ {key} timeout {UDP_IDLE} }} goto inward;"
        yield f"{request} update @echoes{number} {{ {ip} daddr . {ip} saddr timeout {ECHO_IDLE} }} goto inward;"


def _told(place: Place) -> Iterator[str]:
    """Copy what the guest is told of who is where; a gateway doesn't name another one."""
    others = f"{TOLD} dup to {quoted(place.copies)};"
    if own := ", ".join(place.of(4)):
        # That others ask for others doesn't take the room of what is for the guest.
        yield f"ether type arp arp htype 1 arp ptype ip arp daddr ip {{ {own} }} {others}"
        yield f"ether type arp arp htype 1 arp ptype ip arp daddr ip != {{ {own} }} {others}"
    yield "icmp type redirect drop;"
    if place.of(6):
        kinds = "{ nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert }"
        yield f"icmpv6 type {kinds} ip6 hoplimit 255 {others}"
    yield "icmpv6 type nd-redirect drop;"


def _packets_over(rate: Rate | None) -> Iterator[str]:
    if rate is not None and rate.packets_per_second is not None:
        at_once = max(rate.packets_per_second // 10, 5)
        yield f"limit rate over {rate.packets_per_second}/second burst {at_once} packets drop;"


def bytes_over(bits_per_second: int) -> str:
    """A match of what is over the rate. At once there may be a tenth of a second, and two of the largest packets."""
    each = bits_per_second // 8
    return f"limit rate over {each} bytes/second burst {max(each // 10, 128 * 1024)} bytes"


def link_local(mac: str) -> str:
    """The address that an interface makes for itself (RFC 4291, appendix A)."""
    parts = bytearray(int(each, 16) for each in mac.split(":"))
    parts[0] ^= 2
    return str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes(parts[:3]) + b"\xff\xfe" + bytes(parts[3:])))


def quoted(name: str) -> str:
    """A device as nft wants it."""
    return f'"{name}"'
