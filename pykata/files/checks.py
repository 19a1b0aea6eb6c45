"""Arguments of file operations, checked before anything is asked of the guest."""

from __future__ import annotations

from pykata.errors import ConfigError

MAX_SIZE = 2**63 - 1        # bytes; off_t
MAX_ID = 2**32 - 2          # the number above it stands for none
PERMISSIONS = 0o7777
MAX_MODE = 0o177777         # with the kind of file, as os.stat gives it


def number(name: str, value: object, most: int = MAX_SIZE, *, least: int = 0) -> int:
    """A whole number that fits."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name}={value!r:.80} is not a whole number from {least} to {most}")
    return int(value)


def mode(name: str, value: object) -> int:
    """Permissions; the kind of file in what ``stat`` gave is left out, as chmod(2) does."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_MODE:
        raise ConfigError(f"{name}={value!r:.80} is not a file's permissions", hint="a number such as 0o755")
    return value & PERMISSIONS


def owner(name: str, value: object) -> int | None:
    """A uid or a gid, or None."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_ID):
        raise ConfigError(f"{name}={value!r:.80} is none that Linux can have", hint="a number, not a name")
    return value


def owners(value: object) -> tuple[int | None, int | None]:
    """A uid and a gid, or neither."""
    if value is None:
        return None, None
    if not isinstance(value, tuple) or len(value) != 2 or None in value:
        raise ConfigError(f"owner={value!r:.80} is not a uid and a gid", hint="e.g. owner=(1000, 1000)")
    return owner("owner", value[0]), owner("owner", value[1])

