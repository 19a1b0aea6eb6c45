"""What a guest asks of DNS: answered by us, and remembered where it leads."""

from __future__ import annotations

from pykata.net.policy import answers, dns
from pykata.net.policy.actions import Actions, Guest, Known, deny
from pykata.net.policy.decide import Decision, Judge
from pykata.net.policy.packets import Packet
from pykata.net.policy.pins import Pins
from pykata.net.policy.shown import RefusedError

NO_NAME = Decision("deny", "name", "it is no name of a host")


class Questions:
    """Those of one tap."""

    def __init__(self, judge: Judge, guest: Guest, actions: Actions, pins: Pins, known: Known) -> None:
        self.judge = judge
        self._guest = guest
        self._do = actions
        self._pins = pins
        self._known = known

    def asks(self, found: Packet) -> None:
        """A datagram to the guest's name server."""
        try:
            asked = dns.question(found.payload)
        except RefusedError as refused:
            deny(self._do, found, refused.reason, str(refused), quietly=True)
            return
        decision = self.judge.name(asked.name) if asked.is_plain else NO_NAME
        if decision.verdict == "deny":
            self._refuse(found, asked, decision.reason, decision.why)
        elif addresses := self._known(asked.name):
            self._pins.pin(asked.name, addresses, dns.KNOWN_TTL)
            self._answer(found, dns.known(asked, addresses))
        elif (asked.kind in dns.ADDRESSES and self._guest.has(dns.VERSIONS[asked.kind])) or asked.kind in dns.OTHERS:
            self._do.ask(asked, found)
        else:
            self._answer(found, dns.empty(asked))

    def answered(self, asked: dns.Question, found: Packet, answer: object | None) -> None:
        """What DNS said, or None if nobody answered."""
        import dns.message as messages

        if not isinstance(answer, messages.Message):
            self._tell(found, asked, "unanswered", "no name server answered")
            self._answer(found, dns.failure(asked))
            return
        try:
            said = dns.found(asked, answer, self.judge.answer)
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
            self._tell(found, asked, "rebinding", why)
        self._pins.pin(asked.name, said.addresses, said.ttl)
        self._answer(found, said.wire)

    def _check_aliases(self, said: dns.Found) -> None:
        for alias in said.aliases:
            if any(rule.names(alias) and not rule.ports for rule in self.judge.policy.deny):
                raise RefusedError("name", f"it is another name of {alias}, which is denied")

    def _refuse(self, found: Packet, asked: dns.Question, reason: str, why: str) -> None:
        self._tell(found, asked, reason, why)
        self._answer(found, dns.refusal(asked, why))

    def _answer(self, found: Packet, wire: bytes) -> None:
        self._do.to_guest(answers.datagram(found, wire))

    def _tell(self, found: Packet, asked: dns.Question, reason: str, why: str) -> None:
        self._do.tell("denied", reason, why, "dns", str(found.destination), found.dport, asked.name)
