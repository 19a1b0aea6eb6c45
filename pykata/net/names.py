"""How names are found in the guest: name servers, search domains, and names of its own."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pykata.errors import ConfigError

_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*", re.IGNORECASE)

MOST_SERVERS = 3        # resolv.conf(5), MAXNS: a resolver looks at no more
MOST_SEARCH = 32
MOST_HOSTS = 4096       # the agent's limit


def check_servers(servers: Sequence[str]) -> tuple[str, ...]:
    """Name servers: addresses that a guest can reach. Raises ConfigError."""
    listed = _listed("dns", servers, 'such as ["1.1.1.1"]')
    if len(listed) > MOST_SERVERS:
        raise ConfigError(f"dns={list(listed)!r} are too many", hint=f"a resolver looks at {MOST_SERVERS}")
    return tuple(_server(each) for each in listed)


def _server(text: str) -> str:
    address = _address(f"dns: {text!r}", text)
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        raise ConfigError(f"dns: {text!r} can't be reached from a guest", hint="that address would be the guest itself")
    return str(address)


def check_search(domains: Sequence[str]) -> tuple[str, ...]:
    """Search domains. Raises ConfigError."""
    listed = _listed("search", domains, 'such as ["corp.example"]')
    for domain in listed:
        if not _NAME.fullmatch(domain):
            raise ConfigError(f"search: {domain!r} is no domain")
    if len(listed) > MOST_SEARCH:
        raise ConfigError(f"search: {len(listed)} domains are too many", hint=f"at most {MOST_SEARCH}")
    return listed


def check_hosts(hosts: Mapping[str, str]) -> dict[str, str]:
    """Names and their addresses. Raises ConfigError."""
    if not isinstance(hosts, Mapping):
        raise ConfigError(f"hosts={hosts!r} is not a mapping", hint='such as {"db": "10.0.0.5"}')
    if len(hosts) > MOST_HOSTS:
        raise ConfigError(f"hosts: {len(hosts)} names are too many", hint=f"at most {MOST_HOSTS}")
    for name in hosts:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"hosts: {name!r} is no name of a host")
    return {name: str(_address(f"hosts[{name!r}]={address!r}", address)) for name, address in hosts.items()}


def _listed(name: str, given: Sequence[str], hint: str) -> tuple[str, ...]:
    if isinstance(given, str | bytes) or not all(isinstance(each, str) for each in given):
        raise ConfigError(f"{name}={given!r} is not a list of text", hint=hint)
    return tuple(given)


def _address(what: str, text: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    if isinstance(text, str) and "%" not in text:       # a zone would be an interface of ours
        try:
            return ipaddress.ip_address(text)
        except ValueError:
            pass
    raise ConfigError(f"{what} is no IP address")


RESOLV_CONFS = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""resolv.conf(5), and what is behind it where it leads to systemd-resolved on this machine's loopback."""


def servers_for_guests() -> tuple[str, ...]:
    """The host's name servers that somebody else can reach, too: not those on its loopback."""
    for file in RESOLV_CONFS:
        try:
            lines = [line.split() for line in file.read_text(errors="replace").splitlines()]
        except OSError:
            continue
        named = [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]
        if found := tuple(each for each in named if _is_reachable(each)):
            return found[:MOST_SERVERS]
    return ()


def _is_reachable(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)        # one with a zone is of an interface of ours
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_link_local)
