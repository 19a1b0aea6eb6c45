"""The connections of a guest that are known, of which there are never too many."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from pykata.net.policy.actions import Actions
from pykata.net.policy.connection import Connection, Flow

MOST_FLOWS = 4096
MOST_READ = 512                 # connections of which bytes are kept, 64 KiB of each at most


class Flows:
    """Those that were used least recently go first; what the kernel had of them goes with them."""

    def __init__(self, actions: Actions) -> None:
        self._do = actions
        self._known: OrderedDict[Flow, Connection] = OrderedDict()
        self._reading: OrderedDict[Flow, None] = OrderedDict()
        """Those of which bytes are kept."""

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, flow: Flow) -> bool:
        return flow in self._known

    def __iter__(self) -> Iterator[Connection]:
        """All of them, while some may go."""
        return iter(list(self._known.values()))

    @property
    def reading(self) -> int:
        """Of how many bytes are kept."""
        return len(self._reading)

    def get(self, flow: Flow) -> Connection | None:
        """That of the flow, if it is known."""
        return self._known.get(flow)

    def keep(self, known: Connection) -> None:
        """Know it from now on."""
        self._known[known.flow] = known
        self._known.move_to_end(known.flow)
        if known.state == "waiting":
            self._reading[known.flow] = None
        while len(self._known) > MOST_FLOWS:
            self.drop(next(iter(self._known)))
        while len(self._reading) > MOST_READ:
            self.drop(next(iter(self._reading)))

    def used(self, flow: Flow) -> None:
        """It was used just now."""
        for where in (self._known, self._reading):
            if flow in where:
                where.move_to_end(flow)

    def grant(self, known: Connection) -> None:
        """Its packets needn't be looked at any more."""
        known.state = "granted"
        self._reading.pop(known.flow, None)
        self._do.forget(known.flow)
        self._do.grant(known.flow)

    def drop(self, flow: Flow) -> None:
        """Know it no more."""
        self._reading.pop(flow, None)
        if self._known.pop(flow, None) is not None:
            self._do.forget(flow)
