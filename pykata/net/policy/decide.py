"""What a policy says of one destination."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

from attrs import frozen

from pykata.net.policy.addresses import Address, is_hosts_own, is_public, must_be_named
from pykata.net.policy.rules import Policy, Rule


@frozen
class Decision:
    """``pass``: to be reached at once; ``inspect``: once it has shown one of the ``names``; or ``deny``.

    ``anything`` says that it may be any name that isn't denied.
    """

    verdict: Literal["pass", "inspect", "deny"]
    reason: str = ""
    why: str = ""
    names: frozenset[str] = frozenset()
    anything: bool = False


PASS = Decision("pass")


@frozen
class Judge:
    """A policy with what it needs to know of this host."""

    policy: Policy
    own: Callable[[Address], bool] = is_hosts_own

    def name(self, name: str) -> Decision:
        """May this name be asked for?"""
        if any(rule.names(name) and not rule.ports for rule in self.policy.deny):
            return _deny("name", f"{name} is denied")
        if self.policy.allow is None or any(rule.names(name) for rule in self.policy.allow):
            return PASS
        return _deny("name", f"{name} isn't among the names that are allowed")

    def answer(self, address: Address) -> bool:
        """May a name lead to this address? Else whoever owns the name would open the networks inside (rebinding)."""
        if self.policy.allow is None:
            return not self._must_be_named(address)
        if is_public(address) and not self.own(address):
            return True
        return any(self._speaks_of(rule, address) for rule in self.policy.allow)

    def destination(self, protocol: str, address: Address, port: int, names: Collection[str]) -> Decision:
        """May it be reached? ``names`` are those under which it was found."""
        denied = self._denied(protocol, address, port, names)
        if denied is not None:
            return denied
        if self.policy.allow is None:
            if self._must_be_named(address):
                return _deny("protected", f"{address} is reached only if it is allowed by itself")
            return self._passed(protocol, port)
        rules = [rule for rule in self.policy.allow if self._speaks_of(rule, address)]
        if any(rule.admits(protocol, port) for rule in rules):
            return self._passed(protocol, port)
        return self._by_name(protocol, address, port, names, about=bool(rules))

    def _denied(self, protocol: str, address: Address, port: int, names: Collection[str]) -> Decision | None:
        for rule in self.policy.deny:
            if not rule.forbids(protocol, port):
                continue
            # Under all its names: another of them may lead to something harmless at the same address.
            if rule.covers(address) or (names and all(rule.names(name) for name in names)):
                return _deny("denied", f"{rule.text} is denied")
        return None

    def _by_name(
        self, protocol: str, address: Address, port: int, names: Collection[str], *, about: bool
    ) -> Decision:
        allow = self.policy.allow or ()
        good = frozenset(
            name for name in names if any(rule.names(name) and rule.admits(protocol, port) for rule in allow)
            and not any(rule.names(name) and rule.forbids(protocol, port) for rule in self.policy.deny)
        )  # fmt: skip
        if good:
            return Decision("inspect" if protocol == "tcp" else "pass", names=good)
        if names or about:
            return _deny("port", f"{protocol} port {port} isn't allowed there" if port else f"{protocol} isn't allowed")
        if self._must_be_named(address):
            return _deny("protected", f"{address} is reached only if it is allowed by itself")
        return _deny("address", f"{address} isn't allowed, and no allowed name leads there")

    def _passed(self, protocol: str, port: int) -> Decision:
        if protocol == "tcp" and self.policy.denies_names:
            return Decision("inspect", anything=True)
        return PASS

    def shown(self, name: str, port: int, decision: Decision) -> Decision:
        """Is the name that a connection shows one that it may have?"""
        if decision.anything:
            if any(rule.names(name) and rule.forbids("tcp", port) for rule in self.policy.deny):
                return _deny("name", f"{name} is denied")
            return PASS
        if name in decision.names:
            return PASS
        return _deny("mismatch", f"it asks for {name}, and what was allowed is {', '.join(sorted(decision.names))}")

    def _speaks_of(self, rule: Rule, address: Address) -> bool:
        """Does an entry of ``allow`` cover the address, and name it where that is needed?"""
        if not rule.covers(address) or rule.network is None:
            return False
        within = must_be_named(address)
        if within:
            return all(rule.network.version == each.version and _inside(rule.network, each) for each in within)
        return rule.network.prefixlen == rule.network.max_prefixlen or not self.own(address)

    def _must_be_named(self, address: Address) -> bool:
        return bool(must_be_named(address)) or self.own(address)


def _inside(network: object, other: object) -> bool:
    return bool(network.subnet_of(other))  # type: ignore[attr-defined]


def _deny(reason: str, why: str) -> Decision:
    return Decision("deny", reason, why)
