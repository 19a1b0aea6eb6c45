"""Paths of this machine, as people give them."""

from __future__ import annotations

import os
from pathlib import Path

from pykata.errors import ConfigError


def check_path(name: str, value: object, hint: str = "text that isn't empty, or a Path") -> Path:
    """A path of this machine. Whether anything is there is another matter. Raises ConfigError."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text or not _can_be_said(text):
        raise ConfigError(f"{name}={value!r:.80} is not a path of this machine", hint=hint)
    return Path(text)


def _can_be_said(text: str) -> bool:
    """Whether it has bytes: what Python has for those that are no text does, other surrogates don't."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True
