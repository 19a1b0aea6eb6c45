"""Which names lead to which addresses, as the guest was told."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from pykata.net.policy.addresses import Address

MOST = 8192             # pairs of a name and an address
LEAST_TTL = 60.0        # seconds; who was told an address may take a moment to use it
GRACE = 30.0
NOTHING: Mapping[str, Iterable[Address]] = MappingProxyType({})
MOST_TTL = 24 * 3600.0


class Pins:
    """Addresses of names, each for as long as DNS said. ``hosts`` are for ever."""

    def __init__(
        self, hosts: Mapping[str, Iterable[Address]] = NOTHING, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._until: OrderedDict[tuple[Address, str], float] = OrderedDict()
        self._names: dict[Address, set[str]] = {}
        self._fixed = {address: set[str]() for addresses in hosts.values() for address in addresses}
        for name, addresses in hosts.items():
            for address in addresses:
                self._fixed[address].add(name.lower())

    def pin(self, name: str, addresses: Iterable[Address], ttl: float) -> None:
        """The name leads there for ``ttl`` seconds and a moment more."""
        until = self._clock() + min(max(ttl, LEAST_TTL), MOST_TTL) + GRACE
        for address in addresses:
            self._until[address, name] = max(until, self._until.pop((address, name), 0.0))
            self._names.setdefault(address, set()).add(name)
        while len(self._until) > MOST:
            self._forget(*next(iter(self._until)))

    def names_of(self, address: Address) -> frozenset[str]:
        """The names that lead to the address now."""
        now = self._clock()
        for name in [name for name in self._names.get(address, ()) if self._until[address, name] < now]:
            self._forget(address, name)
        return frozenset(self._names.get(address, set()) | self._fixed.get(address, set()))

    def _forget(self, address: Address, name: str) -> None:
        del self._until[address, name]
        names = self._names[address]
        names.discard(name)
        if not names:
            del self._names[address]
