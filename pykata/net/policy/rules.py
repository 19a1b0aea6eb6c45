"""What a guest may reach: values, and how they are written."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from attrs import evolve, field, frozen

from pykata.errors import ConfigError
from pykata.net.policy.addresses import Address, IPNetwork

Protocol = Literal["", "tcp", "udp", "icmp"]

FORMS = 'written as "example.org", "*.example.org:443", "10.0.0.0/8", "udp:10.0.0.53:53", "[2001:db8::/32]:8000-8999"'
WEB = ((80, 80), (443, 443))
"""Ports of a name without ports: those on which the name that is asked for can be read."""
ALL_PORTS = ((0, 65535),)
MOST_RULES = 4096

_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")
_PROTOCOL = re.compile(r"(tcp|udp|icmp):")
_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


@frozen
class Rule:
    """One entry: a ``name`` (``*.`` in front stands for everything below it) or a ``network``, never both.

    ``protocol`` "" is TCP, UDP and ICMP for a network without ports, and TCP otherwise.
    """

    text: str
    protocol: Protocol = ""
    name: str = ""
    network: IPNetwork | None = None
    ports: tuple[tuple[int, int], ...] = ()

    def names(self, name: str) -> bool:
        """Is it about this name, which is in lower case?"""
        if self.name.startswith("*."):
            return name.endswith(self.name[1:]) and len(name) > len(self.name) - 1
        return bool(self.name) and name == self.name

    def covers(self, address: Address) -> bool:
        """Is it about this address?"""
        return self.network is not None and address.version == self.network.version and address in self.network

    def admits(self, protocol: str, port: int) -> bool:
        """Is it about this protocol (tcp, udp, icmp) and port?"""
        if self.protocol or self.ports or self.name:
            wanted = self.protocol or "tcp"
        else:
            return True
        if protocol != wanted:
            return False
        if protocol == "icmp":
            return True
        ports = self.ports or (WEB if self.name else ALL_PORTS)
        return any(first <= port <= last for first, last in ports)

    def forbids(self, protocol: str, port: int) -> bool:
        """As an entry of ``deny``, which without a protocol or ports is about all of them."""
        if self.protocol and protocol != self.protocol:
            return False
        return not self.ports or any(first <= port <= last for first, last in self.ports)


@frozen
class Rate:
    """Limits on what a guest sends and receives, for each direction; None is no limit.

    ::

        Network(rate=Rate(bits_per_second=10_000_000, packets_per_second=2_000))
    """

    bits_per_second: int | None = None
    packets_per_second: int | None = None

    def __attrs_post_init__(self) -> None:
        for name, least in (("bits_per_second", 8_000), ("packets_per_second", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"rate: {name}={value!r} is not a limit", hint=f"a whole number from {least} on")
            if value is not None and value > 30_000_000_000:
                raise ConfigError(f"rate: {name}={value!r} is more than anything sends", hint="leave it out")


@frozen
class Policy:
    """What a guest may reach. ``allow`` None is everything that isn't denied; ``deny`` wins."""

    allow: tuple[Rule, ...] | None = None
    deny: tuple[Rule, ...] = ()
    rate: Rate | None = None
    restricts: bool = field(init=False)
    """Is there anything but a rate?"""

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "restricts", self.allow is not None or bool(self.deny))

    @property
    def denies_names(self) -> bool:
        """Then a connection must show its name even where the address is allowed."""
        return any(rule.name for rule in self.deny)

    def with_allowed(self, entries: Sequence[str]) -> Policy:
        """One that allows more. What was denied under the very same words isn't any more."""
        rules = parse_rules("allow", entries)
        words = {rule.text for rule in rules}
        kept = tuple(rule for rule in self.deny if rule.text not in words)
        return evolve(self, allow=None if self.allow is None else _bounded((*self.allow, *rules)), deny=kept)

    def with_denied(self, entries: Sequence[str]) -> Policy:
        """One that allows less. What was allowed under the very same words isn't any more."""
        rules = parse_rules("deny", entries)
        words = {rule.text for rule in rules}
        allow = None if self.allow is None else tuple(rule for rule in self.allow if rule.text not in words)
        return evolve(self, allow=allow, deny=_bounded((*self.deny, *rules)))


def policy_of(allow: Sequence[str] | None, deny: Sequence[str], rate: object | None) -> Policy | None:
    """The policy that the arguments of a network say, or None if they say nothing. Raises ConfigError."""
    if allow is None and not deny and rate is None:
        return None
    if rate is not None and not isinstance(rate, Rate):
        raise ConfigError(f"rate={rate!r} is not a Rate", hint="such as Rate(bits_per_second=10_000_000)")
    allowed = None if allow is None else parse_rules("allow", allow)
    return Policy(allowed, parse_rules("deny", deny), rate)


def parse_rules(argument: str, entries: Sequence[str]) -> tuple[Rule, ...]:
    """The entries of ``allow`` or ``deny``. Raises ConfigError that names the entry."""
    if isinstance(entries, str | bytes) or not isinstance(entries, Iterable):
        hint = 'such as ["pypi.org", "10.0.0.0/8:443"]'
        raise ConfigError(f"{argument}={entries!r} is not a list of text", hint=hint)
    return _bounded(tuple(dict.fromkeys(_rule(argument, entry) for entry in entries)))


def _bounded(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    if len(rules) > MOST_RULES:
        raise ConfigError(f"{len(rules)} entries are too many for a policy", hint=f"at most {MOST_RULES}")
    return rules


def _rule(argument: str, entry: object) -> Rule:
    what = f"{argument}: {entry!r}"
    if not isinstance(entry, str):
        raise ConfigError(f"{what} is not text", hint=FORMS)
    _check_no_url(what, entry)
    text = entry.strip().lower()
    match = _PROTOCOL.match(text)
    protocol, rest = (match[1], text[match.end():]) if match else ("", text)
    host, ports = _split(what, rest)
    rule = Rule(text, protocol, ports=_ports(what, ports))  # type: ignore[arg-type]
    network = _network(what, host)
    rule = evolve(rule, network=network) if network is not None else evolve(rule, name=_name(what, host))
    _check_protocol(what, rule)
    return rule


def _check_no_url(what: str, entry: str) -> None:
    if "://" in entry:
        raise ConfigError(f"{what} is a URL", hint='give the name of its host, and its port: "example.org:443"')
    if entry.strip() in ("*", "any", "all"):
        raise ConfigError(f"{what} names nothing", hint='leave allow out, or allow "0.0.0.0/0" and "::/0"')


def _check_protocol(what: str, rule: Rule) -> None:
    if rule.protocol == "icmp" and (rule.ports or rule.name):
        raise ConfigError(f"{what}: ICMP is allowed by address, and has no ports", hint='such as "icmp:10.0.0.0/8"')
    if rule.protocol == "udp" and rule.name and not rule.ports:
        raise ConfigError(f"{what} has no port", hint=f'such as "udp:{rule.name}:123"')


def _split(what: str, text: str) -> tuple[str, str | None]:
    """A host and the ports behind it."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ConfigError(f"{what} isn't an address in brackets", hint='such as "[2001:db8::/32]:443"')
        if ":" not in host:
            raise ConfigError(f"{what}: only IPv6 addresses are in brackets", hint=FORMS)
        return host, rest[1:] if rest else None
    if text.count(":") > 1:
        return text, None
    host, colon, ports = text.partition(":")
    return host, ports if colon else None


def _ports(what: str, text: str | None) -> tuple[tuple[int, int], ...]:
    if text is None:
        return ()
    match = _PORTS.fullmatch(text) if text.isascii() else None
    if match is not None:
        first, last = int(match[1]), int(match[2] or match[1])
        if 1 <= first <= last <= 65535:
            return ((first, last),)
    raise ConfigError(f"{what}: {text!r} is neither a port nor a range", hint='such as ":443" or ":8000-8999"')


def _network(what: str, host: str) -> IPNetwork | None:
    """The network that is meant, or None if a name is."""
    plain = host.partition("/")[0]
    looks = "/" in host or ":" in host or plain.rpartition(".")[2].isdigit()
    if not looks or "%" in host:
        return None
    try:
        return ipaddress.ip_network(host)
    except ValueError as exc:
        hint = FORMS
        if "host bits" in str(exc):
            hint = f"give {ipaddress.ip_network(host, strict=False)}, or the address alone"
        raise ConfigError(f"{what} is no IP address or network", hint=hint) from None


def _name(what: str, host: str) -> str:
    """A name as DNS has it (RFC 1035; RFC 5891 for other alphabets)."""
    host = host.removesuffix(".")
    try:
        wildcard = host.startswith("*.")
        encoded = host.removeprefix("*.").encode("idna").decode().lower() if not host.isascii() else host
        encoded = f"*.{encoded}" if wildcard and not host.isascii() else encoded
    except UnicodeError:
        encoded = ""
    if not _NAME.fullmatch(encoded):
        raise ConfigError(f"{what} is neither a name nor an address", hint=FORMS)
    return encoded
