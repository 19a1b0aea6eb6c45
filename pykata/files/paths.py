"""Paths in a container: text on the host, bytes in Linux. What isn't UTF-8 becomes surrogates, as in :mod:`os`."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from pykata.errors import ConfigError

ContainerPath = str | PurePosixPath
"""A path in a container, absolute or relative to its working directory."""


def raw(path: ContainerPath, name: str = "path") -> bytes:
    """A path as the container has it. Raises :class:`ConfigError` for what can't be one."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise ConfigError(f"{name}={path!r:.80} is not a path", hint="give text, or a PurePosixPath")
    if not text or "\0" in text:
        raise ConfigError(f"{name}={text!r:.80} is not a path", hint="it is empty, or has a NUL in it")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError(f"{name}={text!r:.80} is not a path", hint="a surrogate in it is no byte") from None


def text(path: bytes) -> str:
    """A path of the container as text."""
    return path.decode("utf-8", "surrogateescape")


def shown(path: bytes) -> str:
    """A path as it may stand in a message: whatever is in it, it is one line of bounded length."""
    quoted = repr(path.decode("utf-8", "backslashreplace"))
    return quoted if len(quoted) <= 200 else quoted[:199] + "…"
