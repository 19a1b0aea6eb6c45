"""How the benchmarks measure and report: medians beside those of a floor that was measured in the same run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Awaitable, Callable, Sequence

import anyio
from attrs import asdict, frozen

Sample = Callable[[], Awaitable[float]]
"""Measures once."""


@frozen
class Row:
    """One figure. ``floor_p50`` is what the same machine can do at best, ``ratio`` is p50 by that; 0: there is none."""

    name: str
    unit: str
    n: int
    p50: float
    p99: float
    floor_p50: float = 0.0
    ratio: float = 0.0


def row(name: str, unit: str, values: Sequence[float], floor: Sequence[float] = ()) -> Row:
    """The row for these measurements."""
    p50 = quantile(values, 0.5)
    floor_p50 = quantile(floor, 0.5) if floor else 0.0
    return Row(name, unit, len(values), p50, quantile(values, 0.99), floor_p50, p50 / floor_p50 if floor_p50 else 0.0)


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share ``q`` of all isn't above; no interpolation, so it is one that was measured."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


async def interleaved(rounds: int, *samples: Sample) -> list[list[float]]:
    """Measure each in turn, ``rounds`` times: what else the machine does then hits all of them alike.

    Every other round goes backwards, so that none always comes after the same.
    """
    values: list[list[float]] = [[] for _ in samples]
    for number in range(rounds):
        for into, sample in list(zip(values, samples, strict=True))[:: -1 if number % 2 else 1]:
            into.append(await sample())
    return values


def main(
    measure: Callable[..., Awaitable[list[Row]]], *, rounds: int, about: str | None, kinds: Sequence[str] = (),
    usual: Sequence[str] = (),
) -> None:  # fmt: skip
    """The command line of a benchmark. One with ``kinds`` is told as its second argument which of them to measure:
    the ``usual`` ones, or all, if nobody asked for others.
    """
    parser = argparse.ArgumentParser(description=about)
    if kinds:
        parser.add_argument("--kind", action="append", choices=kinds, help="only this one; may be repeated")
    parser.add_argument("-n", "--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="a list of objects in place of the table")
    arguments = parser.parse_args()
    rows = anyio.run(measure, arguments.rounds, *([arguments.kind or usual or kinds] if kinds else []))
    print(json.dumps([asdict(each) for each in rows], indent=2) if arguments.json else table(rows))


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [("", "n", "p50", "p99", "floor", "ratio")]
    for each in rows:
        floor = (f"{each.floor_p50:.1f}", f"{each.ratio:.2f}") if each.floor_p50 else ("", "")
        lines.append((f"{each.name} [{each.unit}]", str(each.n), f"{each.p50:.1f}", f"{each.p99:.1f}", *floor))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
    return "  ".join([line[0].ljust(widths[0]), *numbers])


def note(text: str) -> None:
    """Something to know about the figures; not part of them."""
    print(text, file=sys.stderr)
