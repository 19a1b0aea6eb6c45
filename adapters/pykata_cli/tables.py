"""What is printed for people: tables, and sizes and ages in them."""

from __future__ import annotations

from collections.abc import Sequence

from pykata_cli.printing import show


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they must be; what a terminal would take for a command is escaped."""
    lines = [[c if c.isprintable() else c.encode("unicode_escape").decode() for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        show("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def age(seconds: float) -> str:
    """A duration in its largest unit."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def size(count: int) -> str:
    """Bytes, in MiB."""
    return f"{count / 2**20:.1f} MiB"
