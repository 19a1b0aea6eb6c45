"""What lists print: tables for people, with sizes and ages in them, and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from attrs import asdict

from pykata_cli.printing import show

Thing = TypeVar("Thing", bound=Any)      # of attrs


def print_list(
    things: Sequence[Thing], kind: str, header: Sequence[str], row: Callable[[Thing], Sequence[str]]
) -> None:
    """As ``--format`` says: ``json``, or a table of these rows."""
    if kind == "json":
        show(json.dumps([asdict(thing) for thing in things], indent=2))
    else:
        print_table([header, *map(row, things)])


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
