"""Who is where on the guest's wire: a packet for one host isn't to reach another one that is on the same bridge.

What the guest is told is read: answers of ARP (RFC 826) and ND (RFC 4861). A packet may go to the MAC of a gateway,
whatever its address, or to that of whoever said of itself that it has this address.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from pykata.net.policy.actions import Actions, Guest
from pykata.net.policy.addresses import Address
from pykata.net.policy.packets import ARP, ICMP6, BadPacketError, Packet, arp, macs, packet

MOST = 1024             # neighbours that are remembered; who was heard of longest ago is forgotten
MOST_EACH = 4           # MACs of one address: after a change frames to the old one may be under way
MOST_ROUTERS = 16       # their MACs
ROUTER, ASKS, ADVERTISES = 134, 135, 136        # types of ICMPv6 (RFC 4861, 4.2 to 4.4)
OPTIONS = {ROUTER: (16, 1), ASKS: (24, 1), ADVERTISES: (24, 2)}
"""Where the options begin, and which of them has the MAC."""

Heard = tuple[Address, bytes, Address]
"""An address, the MAC that it says it has, and who was told."""


class Stations:
    """Those around one tap. What is known from the start stays so, whatever anybody says."""

    def __init__(self, guest: Guest, actions: Actions) -> None:
        self._do = actions
        self._own = frozenset(guest.addresses)
        self._named = frozenset(guest.gateways)
        self._gateways = dict.fromkeys(guest.gateways)
        self._fixed = dict(guest.neighbours)
        self._near: dict[Address, dict[bytes, bool]] = {}       # whether the kernel knows, too
        self._routers: dict[bytes, None] = {}
        for address, mac in self._fixed.items():
            self._add(address, mac)

    def heard(self, frame: bytes) -> bool:
        """Remember what the guest is told of others; False for a frame that is about something else."""
        try:
            _, source, kind = macs(frame)
            found = [_of_arp(frame)] if kind == ARP else list(self._of_nd(packet(frame), source))
        except BadPacketError:
            return False
        for address, mac, told in found:
            # As the guest's kernel does: who asks for somebody else is nobody new.
            if told in self._own or address in self._gateways or address in self._near:
                self._learn(address, mac)
        return bool(found)

    def _of_nd(self, found: Packet, source: bytes) -> Iterator[Heard]:
        kind = found.segment[0] if found.protocol == ICMP6 and found.segment else 0
        if kind not in OPTIONS or found.hops != 255 or len(found.segment) < OPTIONS[kind][0]:
            return
        mac = _option(found.segment, *OPTIONS[kind]) or source
        if kind == ROUTER:
            self._advertised(found.source)
            yield found.source, mac, found.destination
        elif kind == ASKS:
            yield found.source, mac, ipaddress.IPv6Address(found.segment[8:24])
        else:
            yield ipaddress.IPv6Address(found.segment[8:24]), mac, found.destination

    def _advertised(self, router: Address) -> None:
        """One says that it is a router; those that the guest was given from the start are never forgotten for it."""
        self._gateways[router] = None
        if len(self._gateways) > len(self._named) + MOST_ROUTERS:
            del self._gateways[next(each for each in self._gateways if each not in self._named)]

    def check(self, found: Packet) -> None:
        """Raise BadPacketError if a frame would get to somebody else than its packet is for."""
        mac = found.frame[:6]
        if mac in self._routers:
            return
        known = self._near.get(found.destination, {})
        if mac not in known:
            raise BadPacketError("misdirected", f"it is for {found.destination}, and its frame for {mac.hex(':')}",
                                 protocol=found.name, address=str(found.destination))
        if not known[mac]:
            known[mac] = True
            self._do.admit(mac, found.destination)

    def _learn(self, address: Address, mac: bytes) -> None:
        if self._fixed.get(address, mac) == mac and not mac[0] & 1 and not address.is_unspecified:
            self._add(address, mac)

    def _add(self, address: Address, mac: bytes) -> None:
        if address in self._gateways and mac not in self._routers:
            self._routers[mac] = None
            self._do.admit(mac, None)
            heard = [each for each in self._routers if each not in self._fixed.values()]
            if len(heard) > MOST_ROUTERS:
                oldest = heard[0]
                del self._routers[oldest]
                self._do.dismiss(oldest, None)
        known = self._near[address] = self._near.pop(address, {})
        known[mac] = known.pop(mac, False)
        if len(known) > MOST_EACH:
            self._forget(address, next(iter(known)))
        if len(self._near) > MOST + len(self._fixed):
            longest_ago = next(each for each in self._near if each not in self._fixed)
            for each in [*self._near[longest_ago]]:
                self._forget(longest_ago, each)

    def _forget(self, address: Address, mac: bytes) -> None:
        known = self._near[address]
        if known.pop(mac):
            self._do.dismiss(mac, address)
        if not known:
            del self._near[address]


def _of_arp(frame: bytes) -> Heard:
    said = arp(frame)
    return ipaddress.IPv4Address(said.sender), said.sender_mac, ipaddress.IPv4Address(said.target)


def _option(segment: bytes, begin: int, wanted: int) -> bytes:
    """The MAC in an option of ND (RFC 4861, 4.6), or nothing."""
    while len(segment) >= begin + 8:
        length = segment[begin + 1] * 8
        if segment[begin] == wanted or not length:
            return segment[begin + 2 : begin + 8] if length else b""
        begin += length
    return b""
