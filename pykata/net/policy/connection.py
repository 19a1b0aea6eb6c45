"""A connection that has to show which host it is for before it may go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from attrs import define, field

from pykata.net.policy import http, tls
from pykata.net.policy.decide import Decision
from pykata.net.policy.packets import ACK, FIN, Packet
from pykata.net.policy.shown import More, RefusedError
from pykata.net.policy.streams import Sent

URG = 32
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
    sent: Sent = field(init=False)
    requests: http.Requests | None = None
    name: str = ""              # that it showed last

    def __attrs_post_init__(self) -> None:
        self.sent = Sent(self.isn + 1 & 0xFFFFFFFF)

    def segment(self, packet: Packet, shown: Shown) -> bool:
        """Look at a segment that isn't a SYN; says whether it goes on. Raises RefusedError."""
        if not packet.flags & ACK:
            return False
        if packet.flags & URG:
            raise RefusedError("urgent", "it sends urgent data, which the server reads in another place, or never")
        if not packet.payload:
            # Of a FIN that comes too early the server would keep the number.
            return not packet.flags & FIN or self.sent.take(packet.seq, b"") is not None
        new = self.sent.take(packet.seq, packet.payload)
        if new is None:
            return False
        if new:
            self._look(new, shown)
        return True

    def acknowledged(self, ack: int) -> bool:
        """The server has what is before this number; says whether the connection can be granted now."""
        self.sent.acknowledge(ack)
        if self.state == "http":
            self.sent.forget()
        return self.state == "shown" and self.sent.acknowledged >= self.sent.length

    def _look(self, new: bytes, shown: Shown) -> None:
        if self.state == "waiting":
            self._recognize(shown)
        elif self.requests is not None:
            self._read(new, shown)

    def _recognize(self, shown: Shown) -> None:
        data, port = self.sent.kept, self.flow.dport
        if len(data) > MOST_UNCLEAR:
            raise RefusedError("unclear", "it doesn't say what it is")
        if port == HTTPS_PORT or (port != HTTP_PORT and tls.looks_like_tls(data)):
            try:
                self._show(tls.server_name(data), shown)
            except More:
                return
            self.state = "shown"
        elif port == HTTP_PORT or (plain := http.is_http(data)):
            self.state, self.requests = "http", http.Requests()
            self._read(data, shown)
        elif plain is not None:
            self.state = "shown"        # neither shows a name: what was allowed is the port of an address

    def _read(self, data: bytes, shown: Shown) -> None:
        assert self.requests is not None
        for name in self.requests.feed(data):
            self._show(name, shown)

    def _show(self, name: str, shown: Shown) -> None:
        self.name = name
        shown(name)
