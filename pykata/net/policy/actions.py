"""Between who decides about a guest's packets and who does what was decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from attrs import field, frozen

from pykata.net.policy import answers, dns
from pykata.net.policy.addresses import Address
from pykata.net.policy.connection import Flow
from pykata.net.policy.packets import TCP, Packet

Known = Callable[[str], Sequence[Address]]
"""Where those names lead that are known without DNS: to wherever whoever knows them says."""
Action = Literal["allowed", "denied"]


@frozen
class Guest:
    """Who the guest is on its network, whom it asks for names, and who is beside it: its gateways, and those whose MACs
    are known."""

    mac: bytes
    addresses: tuple[Address, ...]
    resolvers: tuple[Address, ...] = ()
    gateways: tuple[Address, ...] = ()
    neighbours: Mapping[Address, bytes] = field(factory=dict)

    def has(self, version: int) -> bool:
        """Has it an address of this version of IP?"""
        return any(each.version == version for each in self.addresses)


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

    def catch_up(self) -> None:
        """Look at the copies that have come: they are of packets that the guest may have answered by now."""

    def forget(self, flow: Flow) -> None:
        """None of that any more."""

    def cut(self, flow: Flow) -> None:
        """As :meth:`forget`, and what the other end began isn't answered either."""

    def admit(self, mac: bytes, address: Address | None) -> None:
        """From now on the kernel lets pass frames for this MAC, as far as they are for the address, or any."""

    def dismiss(self, mac: bytes, address: Address | None) -> None:
        """Not any more."""

    def ask(self, question: dns.Question, packet: Packet) -> None:
        """Ask DNS; the answer comes to :meth:`~pykata.net.policy.inspector.Inspector.answered`."""

    def tell(self, action: Action, reason: str, why: str, protocol: str, address: str, port: int, name: str) -> None:
        """What happened."""


def allow(do: Actions, found: Packet, name: str) -> None:
    """Tell whoever watches."""
    do.tell("allowed", "", "", found.name, str(found.destination), found.dport, name)


def deny(do: Actions, found: Packet, reason: str, why: str, *, name: str = "", quietly: bool = False) -> None:
    """Tell whoever watches, and the guest, at once."""
    do.tell("denied", reason, why, found.name, str(found.destination), found.dport, name)
    if quietly or found.destination.is_multicast or found.to_many:
        return
    answer = answers.reset(found) if found.protocol == TCP else answers.prohibited(found)
    if answer is not None:
        do.to_guest(answer)
