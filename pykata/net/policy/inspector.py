"""Decides about the packets of a guest that the kernel doesn't know what to do with. It never waits."""

from __future__ import annotations

import ipaddress

from attrs import evolve

from pykata.net.policy.actions import Actions, Guest, Known, allow, deny
from pykata.net.policy.connection import Connection, flow_of
from pykata.net.policy.decide import Decision, Judge
from pykata.net.policy.flows import Flows
from pykata.net.policy.packets import (
    ARP,
    ICMP,
    ICMP6,
    IPV6,
    TCP,
    UDP,
    BadPacketError,
    Packet,
    macs,
    packet,
)
from pykata.net.policy.packets import arp as parse_arp
from pykata.net.policy.pins import Pins
from pykata.net.policy.questions import Questions
from pykata.net.policy.rules import Policy
from pykata.net.policy.segments import Segments
from pykata.net.policy.stations import Stations

DNS_PORT = 53
ECHO, ECHO6 = 8, 128
ND = range(133, 138)            # of ICMPv6: solicitations and advertisements of routers, of neighbours; redirects
MOST_ARP = 60                   # bytes of the shortest frame
NEIGHBOURS = (135, 136)         # (RFC 4861)


class Inspector:
    """One for each tap."""

    def __init__(self, judge: Judge, guest: Guest, actions: Actions, pins: Pins, known: Known) -> None:
        self._judge = judge
        self._guest = guest
        self._do = actions
        self._pins = pins
        self.flows = Flows(actions)
        self._questions = Questions(judge, guest, actions, pins, known)
        self._segments = Segments(judge, actions, pins, self.flows)
        self._stations = Stations(guest, actions)
        self.answered = self._questions.answered
        self._by_protocol = {TCP: self._segments.from_guest, UDP: self._udp, ICMP: self._icmp, ICMP6: self._icmp}

    def from_guest(self, frame: bytes) -> None:
        """Decide about a frame that the guest sends."""
        try:
            self._frame(frame)
        except BadPacketError as bad:
            self._do.tell("denied", bad.reason, f"{bad}", bad.protocol, bad.address, 0, "")

    def to_guest_seen(self, frame: bytes) -> None:
        """Look at the copy of a frame that the guest is sent."""
        if not self._stations.heard(frame):
            self._segments.to_guest(frame)

    def _frame(self, frame: bytes) -> None:
        _, source, kind = macs(frame)
        if source != self._guest.mac:
            raise BadPacketError("spoofed", f"it comes from {source.hex(':')}, which isn't the guest's MAC")
        if kind == ARP:
            self._arp(frame)
            return
        if kind == IPV6 and not self._guest.has(6):
            raise BadPacketError("ipv6", "IPv6, which this sandbox doesn't have", protocol="ip6")
        found = packet(frame)
        if found.protocol == ICMP6 and found.segment[:1] and found.segment[0] in ND:
            self._neighbour(found)
            return
        if found.source not in self._guest.addresses:
            raise BadPacketError("spoofed", f"it comes from {found.source}, which isn't the guest's address",
                                 protocol=found.name, address=str(found.destination))
        if found.to_many and not found.is_for_many:
            raise BadPacketError("malformed", "it is for one host, and its frame for many", protocol=found.name,
                                 address=str(found.destination))
        if not found.to_many:
            self._do.catch_up()             # the guest may have been told just now where that is
            self._stations.check(found)
        self._by_protocol.get(found.protocol, self._other)(found)

    def _arp(self, frame: bytes) -> None:
        said = parse_arp(frame)
        if said.sender_mac != self._guest.mac or ipaddress.IPv4Address(said.sender) not in self._guest.addresses:
            raise BadPacketError("spoofed", f"ARP says that {ipaddress.IPv4Address(said.sender)} is the guest's",
                                 protocol="arp", address=str(ipaddress.IPv4Address(said.target)))
        if len(frame) > MOST_ARP:
            raise BadPacketError("malformed", "ARP with more in it than there is to say", protocol="arp")
        raise BadPacketError("flood", "more ARP than a guest has to send", protocol="arp")

    def _neighbour(self, found: Packet) -> None:
        what = "it says where others are" if found.segment[0] in NEIGHBOURS else "it has nothing to say about routers"
        raise BadPacketError("spoofed" if found.segment[0] in NEIGHBOURS else "router", what,
                             protocol="nd", address=str(found.destination))

    def _other(self, found: Packet) -> None:
        deny(self._do, found, "protocol", f"the protocol {found.name}")

    def _icmp(self, found: Packet) -> None:
        kind = found.segment[0] if found.segment else -1
        if kind not in (ECHO, ECHO6):
            deny(self._do, found, "protocol", f"ICMP of type {kind}", quietly=True)
            return
        decision = self._judge.destination("icmp", found.destination, 0, ())
        if decision.verdict == "deny":
            self._deny(found, decision)
            return
        allow(self._do, found, "")
        self._do.onward(found.frame)

    def _udp(self, found: Packet) -> None:
        if found.dport == DNS_PORT and found.destination in self._guest.resolvers:
            self._questions.asks(found)
            return
        names = self._pins.names_of(found.destination)
        decision = self._judge.destination("udp", found.destination, found.dport, names)
        if decision.verdict == "deny":
            other = decision.reason == "address" and found.dport == DNS_PORT
            self._deny(found, evolve(decision, reason="resolver") if other else decision)
            return
        flow = flow_of(found)
        if flow not in self.flows:
            allow(self._do, found, ", ".join(sorted(decision.names)))
        self.flows.keep(Connection(flow, decision, "granted"))
        self._do.grant(flow)
        self._do.onward(found.frame)

    def _deny(self, found: Packet, decision: Decision) -> None:
        names = self._pins.names_of(found.destination) if decision.reason in ("port", "denied") else ()
        deny(self._do, found, decision.reason, decision.why, name=", ".join(sorted(names)))

    # --- what is allowed changes ---

    def change(self, policy: Policy) -> None:
        """Another policy, from now on. What it doesn't allow any more ends."""
        self._judge = self._questions.judge = self._segments.judge = evolve(self._judge, policy=policy)
        for known in self.flows:
            flow, address = known.flow, ipaddress.ip_address(known.flow.destination)
            protocol = "tcp" if flow.protocol == TCP else "udp"
            decision = self._anew(known, protocol)
            if decision.verdict != "deny":
                known.decision = decision
                continue
            self.flows.drop(flow)
            self._do.cut(flow)
            self._do.tell("denied", decision.reason, f"a connection was cut: {decision.why}", protocol,
                          str(address), flow.dport, known.name)

    def _anew(self, known: Connection, protocol: str) -> Decision:
        """What is to be said of a connection now."""
        address, port = ipaddress.ip_address(known.flow.destination), known.flow.dport
        names = {known.name} if known.name else set(known.decision.names) or self._pins.names_of(address)
        decision = self._judge.destination(protocol, address, port, names)
        if decision.verdict == "inspect" and known.name:
            shown = self._judge.shown(known.name, port, decision)
            return shown if shown.verdict == "deny" else decision
        return decision


