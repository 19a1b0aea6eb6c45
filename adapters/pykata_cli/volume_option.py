"""``--volume`` of ``pykata run``."""

from __future__ import annotations

from collections.abc import Sequence

import pykata


def volumes(given: Sequence[str]) -> dict[str, pykata.Bind | pykata.Named]:
    """What ``--volume SOURCE:PLACE[:ro]`` says, by place. A source with a slash is a path, another one a name."""
    found: dict[str, pykata.Bind | pykata.Named] = {}
    for text in given:
        rest, readonly = (text.removesuffix(":ro"), True) if text.endswith(":ro") else (text, False)
        source, _, place = rest.rpartition(":")
        if not source or not place.startswith("/"):
            raise pykata.ConfigError(f"--volume {text!r} is not SOURCE:PLACE",
                                     hint="such as ./data:/data or cache:/c:ro")
        if place in found:
            raise pykata.ConfigError(f"--volume {place} is there twice")
        is_path = "/" in source or source in (".", "..")
        found[place] = pykata.Bind(source, readonly) if is_path else pykata.Named(source, readonly)
    return found
