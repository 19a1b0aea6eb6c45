"""``pykata volumes``."""

from __future__ import annotations

import argparse
import time

import pykata
from pykata_cli import exits
from pykata_cli.each import each_name
from pykata_cli.tables import age, print_list, size

HEADER = ("NAME", "SIZE", "LIMIT", "CHANGED", "USED")


async def command(arguments: argparse.Namespace) -> int:
    """List the named volumes, or remove some."""
    if arguments.verb == "rm":
        return await _remove(arguments.names, force=arguments.force)
    volumes = await pykata.describe_volumes()
    print_list(volumes, arguments.format, HEADER, row)
    return 0


def row(volume: pykata.StoredVolume) -> tuple[str, ...]:
    """A volume in the table."""
    limit = "-" if volume.limit is None else size(volume.limit)
    used = "yes" if volume.in_use else "-"
    return volume.name, size(volume.size), limit, f"{age(time.time() - volume.changed)} ago", used


async def _remove(names: list[str], *, force: bool) -> int:
    for name in names:
        pykata.Named(name)          # one that is no name at all is refused before anything is removed

    async def remove(name: str) -> None:
        pykata.remove_volume(name, force=force)

    return await each_name(names, remove, exits.NOT_ALL)
