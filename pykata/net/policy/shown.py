"""What the readers of connections' first bytes tell their caller."""

from __future__ import annotations


class More(Exception):
    """It can't be said before there is more."""


class RefusedError(ValueError):
    """It shows no name, or can't be read without doubt. ``reason`` is a word for it."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason
