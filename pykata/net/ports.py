"""Ports of the guest that are published on the host."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence

from pykata.errors import ConfigError
from pykata.spec import Port

Ports = Mapping[int | tuple[str, int], int | str] | Sequence[int | str | Port]
"""``{8080: 80}``, ``{("127.0.0.1", 0): "53/udp"}``, ``["8080:80", "0.0.0.0:8443:443", "53:53/udp", 80]``."""

_TEXT = re.compile(
    r"(?:(?:\[(?P<v6>[^\]]+)\]|(?P<v4>[^:\[\]]+)):)??"
    r"(?:(?P<host>[0-9]{1,5})?:)?(?P<guest>[0-9]{1,5})(?:/(?P<how>\w+))?"
)

HINT = 'such as {8080: 80}, {("127.0.0.1", 0): "53/udp"} or ["8080:80", "[::1]:8080:80/udp"]'
MOST = 256
"""Ports of a sandbox: each costs a descriptor or two."""


def parse_ports(given: Ports) -> tuple[Port, ...]:
    """Ports as a caller writes them, checked. Raises ConfigError that names the entry."""
    if isinstance(given, Mapping):
        ports = tuple(_of_item(key, value) for key, value in given.items())
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes):
        ports = tuple(port(each) for each in given)
    else:
        raise ConfigError(f"ports={given!r} is neither a mapping nor a list", hint=HINT)
    if len(ports) > MOST:
        raise ConfigError(f"ports: {len(ports)} are too many", hint=f"at most {MOST}")
    taken = [(each.address, each.host, each.protocol) for each in ports if each.host]
    for each in taken:
        if taken.count(each) > 1:
            raise ConfigError(f"ports: {each[0]}:{each[1]}/{each[2]} is there twice")
    return ports


def port(given: object) -> Port:
    """One port: a Port, the guest's number, or text as Docker has it: ``[ADDRESS:][HOST:]GUEST[/tcp|udp]``."""
    if isinstance(given, Port):
        return _checked(given, given)
    if isinstance(given, int) and not isinstance(given, bool):
        return _checked(Port(given), given)
    match = _TEXT.fullmatch(given) if isinstance(given, str) else None
    if match is None:
        raise _refused(given)
    address = match["v6"] or match["v4"] or "127.0.0.1"
    return _checked(Port(int(match["guest"]), int(match["host"] or 0), address, match["how"] or "tcp"), given)  # type: ignore[arg-type]


def _of_item(key: object, value: object) -> Port:
    """An entry of a mapping: where on the host, and what in the guest."""
    address, host = key if isinstance(key, tuple) and len(key) == 2 else ("127.0.0.1", key)
    guest = port(value)
    if guest.host or isinstance(value, Port) or not isinstance(host, int) or isinstance(host, bool):
        raise _refused((key, value))
    return _checked(Port(guest.guest, host, address, guest.protocol), (key, value))


def _checked(found: Port, given: object) -> Port:
    numbers = (found.guest, found.host)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in numbers):
        raise _refused(given)
    if not 1 <= found.guest <= 65535 or not 0 <= found.host <= 65535 or found.protocol not in ("tcp", "udp"):
        raise _refused(given)
    try:
        address = ipaddress.ip_address(found.address)
    except ValueError:
        raise _refused(given) from None
    return Port(found.guest, found.host, str(address), found.protocol)


def _refused(given: object) -> ConfigError:
    return ConfigError(f"ports: {given!r} is no port of the host and one of the guest", hint=HINT)
