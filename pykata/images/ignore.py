"""What is left out of a directory: the patterns of ``.dockerignore``."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Ignored:
    """Whether a path, relative and without a leading slash, is left out. The last pattern that fits decides."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._rules = [(not line.startswith("!"), _compiled(line.lstrip("!"))) for line in patterns]

    def __call__(self, path: str) -> bool:
        out = False
        for excludes, pattern in self._rules:
            if excludes != out and pattern.fullmatch(path):
                out = excludes
        return out


def parse_ignore(text: str) -> tuple[str, ...]:
    """The patterns of a ``.dockerignore``."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as Go's ``filepath.Match`` has them, and ``**``; it fits what is below such a path as well."""
    pattern = "/".join(part for part in pattern.strip().split("/") if part not in ("", "."))
    found, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            found, at = found + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            found, at = found + ".*", at + 2
        elif (special := {"*": "[^/]*", "?": "[^/]"}.get(pattern[at])) is not None:
            found, at = found + special, at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            found, at = found + _set(pattern[at + 1:end]), end + 1
        else:
            at += pattern[at] == "\\" and at + 1 < len(pattern)
            found, at = found + re.escape(pattern[at]), at + 1
    return re.compile(f"{found}(?:/.*)?", re.DOTALL)


def _set(inside: str) -> str:
    negated, inside = inside.startswith("^"), inside.removeprefix("^")
    escaped = re.sub(r"([\\\[\]^&|~])", r"\\\1", inside)
    return f"[{'^' if negated else ''}{escaped}]"
