"""What a guest sends by TCP: who may connect, what a connection has to show, and when it needs no looking at."""

from __future__ import annotations

from attrs import evolve

from pykata.net.policy import answers
from pykata.net.policy.actions import Actions, allow, deny
from pykata.net.policy.connection import Connection, flow_of
from pykata.net.policy.decide import Decision, Judge
from pykata.net.policy.flows import Flows
from pykata.net.policy.packets import ACK, FIN, RST, SYN, URG, BadPacketError, Packet, packet, plain_syn
from pykata.net.policy.pins import Pins
from pykata.net.policy.shown import RefusedError


class Segments:
    """Those of one tap."""

    def __init__(self, judge: Judge, actions: Actions, pins: Pins, flows: Flows) -> None:
        self.judge = judge
        self._do = actions
        self._pins = pins
        self._flows = flows

    def from_guest(self, found: Packet) -> None:
        """Decide about one."""
        known = self._flows.get(flow_of(found))
        if found.flags & (SYN | ACK) == SYN:
            self._begins(found, known)
        elif known is None:
            deny(self._do, found, "state", "TCP that belongs to no connection")
        else:
            self._flows.used(known.flow)
            self._continues(found, known)

    # --- it begins ---

    def _begins(self, found: Packet, known: Connection | None) -> None:
        if found.flags & (FIN | RST | URG):
            deny(self._do, found, "malformed", "a SYN that is the end of a connection, or urgent")
        elif found.payload:
            # With TCP Fast Open (RFC 7413) a server would take it at once.
            deny(self._do, found, "early", "data comes with the SYN, before it can be said what for")
        elif known is not None and known.repeats(found):
            self._do.onward(_syn(found, known.decision))
        else:
            self._connects(found)

    def _connects(self, found: Packet) -> None:
        flow = flow_of(found)
        self._flows.drop(flow)
        names = self._pins.names_of(found.destination)
        decision = self.judge.destination("tcp", found.destination, found.dport, names)
        if decision.verdict == "deny":
            name = ", ".join(sorted(names)) if decision.reason in ("port", "denied") else ""
            deny(self._do, found, decision.reason, decision.why, name=name)
            return
        passes = decision.verdict == "pass"
        self._flows.keep(Connection(flow, decision, "granted" if passes else "waiting", found.seq))
        if passes:
            allow(self._do, found, "")
            self._do.grant(flow)
        else:
            self._do.read(flow)
        self._do.onward(_syn(found, decision))

    # --- it goes on ---

    def _continues(self, found: Packet, known: Connection) -> None:
        if known.state == "granted":        # it was silent for so long that the kernel has forgotten it
            self._do.grant(known.flow)
            self._do.onward(found.frame)
            return
        if not known.accepted:
            self._do.catch_up()             # the server may have accepted it just now
        before = known.state
        try:
            goes_on = bool(found.flags & RST) or known.segment(found, lambda name: self._shown(known, found, name))
        except RefusedError as refused:
            self._flows.drop(known.flow)
            deny(self._do, found, refused.reason, str(refused), name=known.name)
            self._do.onward(answers.reset_onward(found))
            return
        if found.flags & RST:
            self._flows.drop(known.flow)
        if known.state == "http" and before != "http":
            self._do.read_on(known.flow)
        if known.state == "shown" and before != "shown" and not known.name:
            allow(self._do, found, ", ".join(sorted(known.decision.names)))
        if goes_on:
            self._do.onward(found.frame)

    def _shown(self, known: Connection, found: Packet, name: str) -> None:
        decision = self.judge.shown(name, found.dport, known.decision)
        if decision.verdict == "deny":
            raise RefusedError(decision.reason, decision.why)
        allow(self._do, found, name)

    # --- what comes back ---

    def to_guest(self, frame: bytes) -> None:
        """A copy of what the network sends the guest in a connection that isn't granted yet."""
        try:
            found = packet(frame)
        except BadPacketError:
            return
        known = self._flows.get(flow_of(evolve(
            found, source=found.destination, destination=found.source, sport=found.dport, dport=found.sport
        )))  # fmt: skip
        if known is not None and known.answered(found):
            self._flows.grant(known)


def _syn(found: Packet, decision: Decision) -> bytes:
    """As it goes on: of what both ends may agree on, only what leaves the bytes of a stream as they were sent."""
    return plain_syn(found) if decision.verdict == "inspect" else found.frame
