"""Sizes as people write them."""

from __future__ import annotations

import re

from pykata.errors import ConfigError
from pykata.spec import MIB

UNITS = {"": MIB, "B": 1, "K": 1024, "M": MIB, "G": 1024 * MIB, "T": 1024 * 1024 * MIB}

MOST = 2**60
"""Bytes: more than anything has, and what fits into a number of 64 bits with room to calculate."""

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([BKMGT]?)(?:iB|B)?", re.IGNORECASE)


def parse_size(name: str, value: object) -> int:
    """Bytes of a size given as MiB (a number) or as text: ``512``, ``"512M"``, ``"1.5G"``, ``"64MiB"``.

    Raises :class:`ConfigError` that names the argument ``name``.
    """
    size = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        size = value * MIB
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = float(match[1]) * UNITS[match[2].upper()]
    if 0 <= size < MOST:
        return int(size)
    raise ConfigError(f"{name}={value!r} is not a size", hint='give MiB as a number, or text such as "512M" or "2G"')
