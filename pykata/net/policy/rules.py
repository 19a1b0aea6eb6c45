"""What a guest may reach: values, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from pykata.errors import ConfigError


@frozen
class Policy:
    """What a guest may reach. ``allow`` None is everything that isn't denied."""

    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()
    rate: object | None = None


def policy_of(allow: Sequence[str] | None, deny: Sequence[str], rate: object | None) -> Policy | None:
    """The policy that the arguments of a network say, or None if they say nothing. Raises ConfigError."""
    if allow is None and not deny and rate is None:
        return None
    for name, entries in (("allow", allow or ()), ("deny", deny)):
        if isinstance(entries, str) or not all(isinstance(entry, str) for entry in entries):
            hint = 'such as ["pypi.org", "10.0.0.0/8:443"]'
            raise ConfigError(f"{name}={entries!r} is not a list of text", hint=hint)
    return Policy(None if allow is None else tuple(allow), tuple(deny), rate)
