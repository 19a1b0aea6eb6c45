"""Addresses that callers give to a guest."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from pykata.errors import ConfigError


def checked_addresses(value: Sequence[str]) -> tuple[str, ...]:
    """Addresses of an interface with their prefixes, as an argument. Raises ConfigError."""
    if isinstance(value, str):
        raise ConfigError(f"addresses={value!r} is not a list", hint='such as ["10.0.0.5/24"]')
    try:
        found = tuple(ipaddress.ip_interface(each) for each in value)
    except ValueError as exc:
        raise ConfigError(f"addresses={list(value)!r}: {exc}") from exc
    return tuple(each.with_prefixlen for each in found)


def checked_gateway(value: str) -> str:
    """An address, or nothing. Raises ConfigError."""
    try:
        return str(ipaddress.ip_address(value)) if value else ""
    except ValueError as exc:
        raise ConfigError(f"gateway={value!r} is no address") from exc


def mac_of(address: str) -> str:
    """One that goes with the address: who has it next is found where the last one was."""
    packed = ipaddress.ip_interface(address).packed[-4:]
    return ":".join(f"{each:02x}" for each in (0x02, 0x70, *packed))
