"""Decides about the packets of a guest that the kernel doesn't know what to do with. It never waits."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from attrs import evolve, frozen

from pykata.net.policy import answers, dns
from pykata.net.policy.addresses import Address
from pykata.net.policy.connection import Connection, Flow
from pykata.net.policy.decide import Decision, Judge
from pykata.net.policy.packets import (
    ACK,
    ARP,
    ICMP,
    ICMP6,
    IPV6,
    RST,
    SYN,
    TCP,
    UDP,
    BadPacketError,
    Packet,
    macs,
    packet,
)
from pykata.net.policy.packets import arp as parse_arp
from pykata.net.policy.pins import Pins
from pykata.net.policy.rules import Policy
from pykata.net.policy.shown import RefusedError

MOST_FLOWS = 4096
MOST_READ = 512                 # connections of which bytes are kept, 64 KiB of each at most
DNS_PORT = 53
ECHO, ECHO6 = 8, 128
NEIGHBOURS = (135, 136)         # solicitation and advertisement (RFC 4861)


NO_NAME = Decision("deny", "name", "it is no name of a host")
Known = Callable[[str], Sequence[Address]]
"""Where those names lead that are known without DNS: to wherever whoever knows them says."""
Action = Literal["allowed", "denied"]


@frozen
class Guest:
    """Who the guest is on its network, and whom it asks for names."""

    mac: bytes
    addresses: tuple[Address, ...]
    resolvers: tuple[Address, ...] = ()

    @property
    def has_ipv6(self) -> bool:
        return any(each.version == 6 for each in self.addresses)


class Actions(Protocol):
    """What can be done about a packet."""

    def to_guest(self, frame: bytes) -> None:
        """Send the guest a frame."""

    def onward(self, frame: bytes) -> None:
        """Send a frame on its way, as if it had come from the guest."""

    def grant(self, flow: Flow) -> None:
        """From now on the kernel lets pass the flow, except for a SYN."""

    def read(self, flow: Flow) -> None:
        """Have a copy of what comes back, for its acknowledgements."""

    def read_on(self, flow: Flow) -> None:
        """As :meth:`read`, and the kernel lets pass what has no data."""

    def forget(self, flow: Flow) -> None:
        """None of that any more."""

    def cut(self, flow: Flow) -> None:
        """As :meth:`forget`, and what the other end began isn't answered either."""

    def ask(self, question: dns.Question, packet: Packet) -> None:
        """Ask DNS; the answer comes to :meth:`Inspector.answered`."""

    def tell(self, action: Action, reason: str, why: str, protocol: str, address: str, port: int, name: str) -> None:
        """What happened."""


class Inspector:
    """One for each tap."""

    def __init__(self, judge: Judge, guest: Guest, actions: Actions, pins: Pins, known: Known) -> None:
        self._judge = judge
        self._guest = guest
        self._do = actions
        self._pins = pins
        self._known = known
        self._flows: OrderedDict[Flow, Connection] = OrderedDict()
        self._reading: OrderedDict[Flow, None] = OrderedDict()
        """Those of which bytes are kept; the one that was used least recently goes first."""

    # --- what the guest sends ---

    def from_guest(self, frame: bytes) -> None:
        """Decide about a frame."""
        try:
            self._frame(frame)
        except BadPacketError as bad:
            self._do.tell("denied", bad.reason, f"{bad}", bad.protocol, bad.address, 0, "")

    def _frame(self, frame: bytes) -> None:
        _, source, kind = macs(frame)
        if source != self._guest.mac:
            raise BadPacketError("spoofed", f"it comes from {source.hex(':')}, which isn't the guest's MAC")
        if kind == ARP:
            self._arp(frame)
            return
        if kind == IPV6 and not self._guest.has_ipv6:
            raise BadPacketError("ipv6", "IPv6, which this sandbox doesn't have", protocol="ip6")
        found = packet(frame)
        if found.protocol == ICMP6 and found.segment[:1] and found.segment[0] in range(133, 138):
            self._neighbour(found)
            return
        if found.source not in self._guest.addresses:
            raise BadPacketError("spoofed", f"it comes from {found.source}, which isn't the guest's address",
                                 protocol=found.name, address=str(found.destination))
        {TCP: self._tcp, UDP: self._udp, ICMP: self._icmp, ICMP6: self._icmp}.get(found.protocol, self._other)(found)

    def _arp(self, frame: bytes) -> None:
        said = parse_arp(frame)
        if said.sender_mac != self._guest.mac or ipaddress.IPv4Address(said.sender) not in self._guest.addresses:
            raise BadPacketError("spoofed", f"ARP says that {ipaddress.IPv4Address(said.sender)} is the guest's",
                                 protocol="arp", address=str(ipaddress.IPv4Address(said.target)))
        raise BadPacketError("flood", "more ARP than a guest has to send", protocol="arp")

    def _neighbour(self, found: Packet) -> None:
        what = "it says where others are" if found.segment[0] in NEIGHBOURS else "it has nothing to say about routers"
        raise BadPacketError("spoofed" if found.segment[0] in NEIGHBOURS else "router", what,
                             protocol="nd", address=str(found.destination))

    def _other(self, found: Packet) -> None:
        self._deny(found, "protocol", f"the protocol {found.name}")

    def _icmp(self, found: Packet) -> None:
        kind = found.segment[0] if found.segment else -1
        if kind not in (ECHO, ECHO6):
            self._deny(found, "protocol", f"ICMP of type {kind}", quietly=True)
            return
        decision = self._judge.destination("icmp", found.destination, 0, ())
        if decision.verdict == "deny":
            self._deny(found, decision.reason, decision.why)
            return
        self._allow(found, "")
        self._do.onward(found.frame)

    # --- UDP ---

    def _udp(self, found: Packet) -> None:
        if found.dport == DNS_PORT and found.destination in self._guest.resolvers:
            self._asks(found)
            return
        names = self._pins.names_of(found.destination)
        decision = self._judge.destination("udp", found.destination, found.dport, names)
        if decision.verdict == "deny":
            other = decision.reason == "address" and found.dport == DNS_PORT
            self._deny(found, "resolver" if other else decision.reason, decision.why)
            return
        flow = _flow(found)
        if flow not in self._flows:
            self._allow(found, ", ".join(sorted(decision.names)))
        self._keep(Connection(flow, decision, "granted"))
        self._do.grant(flow)
        self._do.onward(found.frame)

    def _asks(self, found: Packet) -> None:
        try:
            asked = dns.question(found.payload)
        except RefusedError as refused:
            self._deny(found, refused.reason, str(refused), quietly=True)
            return
        decision = self._judge.name(asked.name) if asked.is_plain else NO_NAME
        if decision.verdict == "deny":
            self._refuse(found, asked, decision.reason, decision.why)
        elif addresses := self._known(asked.name):
            self._pins.pin(asked.name, addresses, dns.KNOWN_TTL)
            self._answer(found, dns.known(asked, addresses))
        elif (asked.kind in dns.ADDRESSES and self._has(asked.kind)) or asked.kind in dns.OTHERS:
            self._do.ask(asked, found)
        else:
            self._answer(found, dns.empty(asked))

    def _has(self, kind: str) -> bool:
        version = 6 if kind == "AAAA" else 4
        return any(each.version == version for each in self._guest.addresses)

    def answered(self, asked: dns.Question, found: Packet, answer: object | None) -> None:
        """What DNS said, or None if nobody answered."""
        import dns.message as messages

        if not isinstance(answer, messages.Message):
            self._tell_dns(found, asked, "unanswered", "no name server answered")
            self._answer(found, dns.failure(asked))
            return
        try:
            said = dns.found(asked, answer, self._judge.answer)
            self._check_aliases(said)
        except RefusedError as refused:
            self._refuse(found, asked, refused.reason, str(refused))
            return
        if said.refused:
            listed = ", ".join(map(str, said.refused))
            why = f"{asked.name} leads to {listed}, which isn't allowed by itself"
            if not said.addresses:
                self._refuse(found, asked, "rebinding", why)
                return
            self._tell_dns(found, asked, "rebinding", why)
        self._pins.pin(asked.name, said.addresses, said.ttl)
        self._answer(found, said.wire)

    def _check_aliases(self, said: dns.Found) -> None:
        for alias in said.aliases:
            if any(rule.names(alias) and not rule.ports for rule in self._judge.policy.deny):
                raise RefusedError("name", f"it is another name of {alias}, which is denied")

    def _refuse(self, found: Packet, asked: dns.Question, reason: str, why: str) -> None:
        self._tell_dns(found, asked, reason, why)
        self._answer(found, dns.refusal(asked, why))

    def _answer(self, found: Packet, wire: bytes) -> None:
        self._do.to_guest(answers.datagram(found, wire))

    def _tell_dns(self, found: Packet, asked: dns.Question, reason: str, why: str) -> None:
        self._do.tell("denied", reason, why, "dns", str(found.destination), found.dport, asked.name)

    # --- TCP ---

    def _tcp(self, found: Packet) -> None:
        flow = _flow(found)
        known = self._flows.get(flow)
        if found.flags & (SYN | ACK | RST) == SYN:
            if known is None or known.isn != found.seq:
                self._connects(found, flow)
            else:
                self._do.onward(found.frame)
        elif known is None:
            self._deny(found, "state", "TCP that belongs to no connection")
        else:
            for used in (self._flows, self._reading):
                if flow in used:
                    used.move_to_end(flow)
            self._continues(found, known)

    def _connects(self, found: Packet, flow: Flow) -> None:
        self._drop(flow)
        names = self._pins.names_of(found.destination)
        decision = self._judge.destination("tcp", found.destination, found.dport, names)
        if found.payload:
            decision = Decision("deny", "early", "data comes with the SYN, before it can be said what for")
        if decision.verdict == "deny":
            self._deny(found, decision.reason, decision.why)
            return
        passes = decision.verdict == "pass"
        self._keep(Connection(flow, decision, "granted" if passes else "waiting", found.seq))
        if passes:
            self._allow(found, "")
            self._do.grant(flow)
        else:
            self._do.read(flow)
        self._do.onward(found.frame)

    def _continues(self, found: Packet, known: Connection) -> None:
        if known.state == "granted":        # it was silent for so long that the kernel has forgotten it
            self._do.grant(known.flow)
            self._do.onward(found.frame)
            return
        before = known.state
        try:
            goes_on = bool(found.flags & RST) or known.segment(found, lambda name: self._shown(known, found, name))
        except RefusedError as refused:
            self._drop(known.flow)
            self._deny(found, refused.reason, str(refused), name=known.name)
            self._do.onward(answers.reset_onward(found))
            return
        if found.flags & RST:
            self._drop(known.flow)
        if known.state == "http" and before != "http":
            self._do.read_on(known.flow)
        if known.state == "shown" and before != "shown" and not known.name:
            self._allow(found, ", ".join(sorted(known.decision.names)))
        if goes_on:
            self._do.onward(found.frame)

    def _shown(self, known: Connection, found: Packet, name: str) -> None:
        decision = self._judge.shown(name, found.dport, known.decision)
        if decision.verdict == "deny":
            raise RefusedError(decision.reason, decision.why)
        self._allow(found, name)

    def to_guest_seen(self, frame: bytes) -> None:
        """A copy of what the network sends the guest in a connection that isn't granted yet."""
        try:
            found = packet(frame)
        except BadPacketError:
            return
        flow = Flow(found.version, found.protocol, found.destination.packed, found.source.packed, found.sport,
                    found.dport)
        known = self._flows.get(flow)
        if known is not None and found.flags & ACK and known.acknowledged(found.ack):
            known.state = "granted"
            self._reading.pop(flow, None)
            self._do.forget(flow)
            self._do.grant(flow)

    # --- what is allowed changes ---

    def change(self, policy: Policy) -> None:
        """Another policy, from now on. What it doesn't allow any more ends."""
        self._judge = evolve(self._judge, policy=policy)
        for flow, known in list(self._flows.items()):
            address = ipaddress.ip_address(flow.destination)
            protocol = "tcp" if flow.protocol == TCP else "udp"
            names = {known.name} if known.name else set(known.decision.names) or self._pins.names_of(address)
            decision = self._judge.destination(protocol, address, flow.dport, names)
            if decision.verdict != "deny" and known.name and decision.verdict == "inspect":
                decision = replace_if_denied(decision, self._judge.shown(known.name, flow.dport, decision))
            if decision.verdict == "deny":
                self._drop(flow)
                self._do.cut(flow)
                self._do.tell("denied", decision.reason, f"a connection was cut: {decision.why}", protocol,
                              str(address), flow.dport, known.name)
            else:
                known.decision = decision

    # --- what comes of it ---

    def _keep(self, known: Connection) -> None:
        self._flows[known.flow] = known
        self._flows.move_to_end(known.flow)
        if known.state == "waiting":
            self._reading[known.flow] = None
        while len(self._flows) > MOST_FLOWS:
            self._drop(next(iter(self._flows)))
        while len(self._reading) > MOST_READ:
            self._drop(next(iter(self._reading)))

    def _drop(self, flow: Flow) -> None:
        self._reading.pop(flow, None)
        if self._flows.pop(flow, None) is not None:
            self._do.forget(flow)

    def _allow(self, found: Packet, name: str) -> None:
        self._do.tell("allowed", "", "", found.name, str(found.destination), found.dport, name)

    def _deny(self, found: Packet, reason: str, why: str, *, name: str = "", quietly: bool = False) -> None:
        """Tell whoever watches, and the guest, at once."""
        if not name and reason in ("port", "denied"):
            name = ", ".join(sorted(self._pins.names_of(found.destination)))
        self._do.tell("denied", reason, why, found.name, str(found.destination), found.dport, name)
        if quietly or found.destination.is_multicast or found.frame[0] & 1:
            return
        answer = answers.reset(found) if found.protocol == TCP else answers.prohibited(found)
        if answer is not None:
            self._do.to_guest(answer)


def replace_if_denied(decision: Decision, shown: Decision) -> Decision:
    """The second one if it denies, else the first."""
    return shown if shown.verdict == "deny" else decision


def _flow(found: Packet) -> Flow:
    return Flow(found.version, found.protocol, found.source.packed, found.destination.packed, found.dport, found.sport)
