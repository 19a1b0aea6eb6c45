"""A connection that has to show which host it is for before it may go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from attrs import define, field

from pykata.net.policy import http, tls
from pykata.net.policy.decide import Decision
from pykata.net.policy.packets import ACK, FIN, SYN, URG, Packet
from pykata.net.policy.shown import RefusedError
from pykata.net.policy.streams import Sent

HTTP_PORT, HTTPS_PORT = 80, 443
MOST_UNCLEAR = 40 * 1024        # bytes without it being clear what they are


class Flow(NamedTuple):
    """What tells the packets of one connection from others, as the guest sends them."""

    version: int
    protocol: int
    source: bytes
    destination: bytes
    dport: int
    sport: int


def flow_of(found: Packet) -> Flow:
    """That of a packet of the guest's."""
    return Flow(found.version, found.protocol, found.source.packed, found.destination.packed, found.dport, found.sport)


State = Literal["waiting", "shown", "granted", "http"]
Shown = Callable[[str], None]
"""Told each name that was read; raises RefusedError if it is the wrong one."""


@define(eq=False)
class Connection:
    """What is known of a connection (or of a flow of UDP, which is granted at once).

    ``waiting`` for a name; ``shown`` one, but the server may still read other bytes than we did; ``granted``: its
    packets don't come here any more; ``http``: its requests are read for as long as it lasts.
    """

    flow: Flow
    decision: Decision
    state: State
    isn: int = 0
    accepted: bool = False      # by the server: our numbers are its numbers, too
    sent: Sent = field(init=False)
    reader: tls.Handshake | http.Requests | None = None
    decisive: int = 0           # how many bytes it took
    name: str = ""              # that it showed last

    def __attrs_post_init__(self) -> None:
        self.sent = Sent(self.isn + 1 & 0xFFFFFFFF)

    def repeats(self, syn: Packet) -> bool:
        """Is it the SYN once more, before anything else was sent? Later, the same number is that of a new connection:
        the guest chooses its numbers."""
        unused = self.decision.verdict == "pass" or (self.state == "waiting" and not self.sent.length)
        return unused and self.isn == syn.seq

    def segment(self, packet: Packet, shown: Shown) -> bool:
        """Look at a segment that isn't a SYN; says whether it goes on. Raises RefusedError."""
        if not packet.flags & ACK or packet.flags & SYN or not self.accepted:
            return False
        if packet.flags & URG:
            raise RefusedError("urgent", "it sends urgent data, which the server reads in another place, or never")
        if not packet.payload:
            # Of a FIN that comes too early the server would keep the number.
            if packet.flags & FIN:
                return self.sent.take(packet.seq, b"") is not None
            return self.sent.continues(packet.seq)
        new = self.sent.take(packet.seq, packet.payload)
        if new is None:
            return False
        if new:
            self._look(new, shown)
        return True

    def answered(self, packet: Packet) -> bool:
        """Look at what comes back; says whether the connection can be granted now.

        Until the server has accepted this very SYN, it may have an older one's numbers, and would take other bytes than
        we see (RFC 5961, 4: it then acknowledges the old ones).
        """
        if packet.flags & (SYN | ACK) == SYN | ACK:
            self.accepted = self.accepted or packet.ack == self.isn + 1 & 0xFFFFFFFF
            return False
        if not self.accepted or not packet.flags & ACK:
            return False
        self.sent.acknowledge(packet.ack)
        if self.state == "http":
            self.sent.forget()
        return self.state == "shown" and self.sent.acknowledged >= self.decisive

    def _look(self, new: bytes, shown: Shown) -> None:
        if self.state == "waiting" and self.reader is None:
            new = self.sent.kept
            self._recognize(new)
        if self.reader is None or self.state == "shown":
            return
        for name in self.reader.feed(new):
            self.name = name
            shown(name)
        if self.reader.done:
            self._decided()

    def _recognize(self, data: bytes) -> None:
        port = self.flow.dport
        if len(data) > MOST_UNCLEAR:
            raise RefusedError("unclear", "it doesn't say what it is")
        encrypted, plain = tls.is_tls(data), http.is_http(data)
        if port == HTTPS_PORT or (port != HTTP_PORT and encrypted):
            self.reader = tls.Handshake()
        elif port == HTTP_PORT or plain:
            self.reader, self.state = http.Requests(), "http"
        elif encrypted is False and plain is False:
            self._decided()     # it shows no name: what was allowed is the port of an address

    def _decided(self) -> None:
        self.state, self.decisive = "shown", self.sent.length
