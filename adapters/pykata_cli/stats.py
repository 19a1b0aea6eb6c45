"""``pykata stats``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack

import anyio
from attrs import asdict, define, field

import pykata
from pykata_cli.printing import show
from pykata_cli.signals import Relay, relayed
from pykata_cli.tables import print_table, size

HEADER = ("NAME", "CONTAINER", "CPU", "CPU TIME", "MEMORY", "PEAK", "PROCESSES")
PERIOD = 2.0            # seconds between two looks
CLEAR = "\x1b[H\x1b[2J"


async def command(arguments: argparse.Namespace) -> int:
    """Show what the sandboxes use, again and again, until they have ended or we are interrupted."""
    return await relayed(_show, arguments)


async def _show(arguments: argparse.Namespace, relay: Relay) -> int:
    names = arguments.names or [one.name for one in pykata.list_detached() if one.phase == "running"]
    async with AsyncExitStack() as stack:
        sandboxes = {name: await stack.enter_async_context(pykata.Sandbox.connect(name)) for name in names}
        table = Table()
        while True:
            looked = await _looked(sandboxes)
            if arguments.format == "json":
                show(json.dumps({name: asdict(stats) for name, stats in looked.items()}))
            else:
                table.show(looked, anyio.current_time(), redraw=not arguments.once and sys.stdout.isatty())
            if arguments.once or not sandboxes:
                return 0
            await anyio.sleep(PERIOD)


async def _looked(sandboxes: dict[str, pykata.Sandbox]) -> dict[str, pykata.Stats]:
    """What each uses; one that has ended is no longer looked at."""
    looked = {}
    for name, sandbox in list(sandboxes.items()):
        try:
            looked[name] = await sandbox.stats()
        except pykata.VMDiedError:
            del sandboxes[name]
    return looked


@define
class Table:
    """What was seen last, from which the share of a CPU follows."""

    _cpu: dict[tuple[str, str], tuple[float, float]] = field(factory=dict)

    def show(self, looked: Mapping[str, pykata.Stats], now: float, *, redraw: bool) -> None:
        """Print it, in place of what was printed before if that is on a terminal."""
        rows = [
            row for name, stats in looked.items()
            for row in ((name, "(guest)", "", "", size(stats.memory_total - stats.memory_available), "", ""),
                        *(self._row(name, identity, one, now) for identity, one in sorted(stats.containers.items())))
        ]  # fmt: skip
        show(CLEAR if redraw else "", end="")
        print_table([HEADER, *rows])

    def _row(self, name: str, identity: str, one: pykata.ContainerStats, now: float) -> tuple[str, ...]:
        before, when = self._cpu.get((name, identity), (one.cpu, now))
        self._cpu[name, identity] = one.cpu, now
        share = f"{(one.cpu - before) / (now - when):.0%}" if now > when else "-"
        return (name, identity, share, f"{one.cpu:.1f} s", size(one.memory), size(one.memory_peak), str(one.pids))
