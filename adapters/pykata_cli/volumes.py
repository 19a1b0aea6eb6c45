"""``pykata volumes``."""

from __future__ import annotations

import argparse
import json
import time

from attrs import asdict

import pykata
from pykata_cli import exits
from pykata_cli.complaint import one_line
from pykata_cli.printing import say, show
from pykata_cli.tables import age, print_table, size

HEADER = ("NAME", "SIZE", "LIMIT", "CHANGED", "USED")


async def command(arguments: argparse.Namespace) -> int:
    """List the named volumes, or remove some."""
    if arguments.verb == "rm":
        return _remove(arguments.names, force=arguments.force)
    volumes = await pykata.describe_volumes()
    if arguments.format == "json":
        show(json.dumps([asdict(volume) for volume in volumes], indent=2))
    else:
        print_table([HEADER, *(row(volume) for volume in volumes)])
    return 0


def row(volume: pykata.StoredVolume) -> tuple[str, ...]:
    """A volume in the table."""
    limit = "-" if volume.limit is None else size(volume.limit)
    used = "yes" if volume.in_use else "-"
    return volume.name, size(volume.size), limit, f"{age(time.time() - volume.changed)} ago", used


def _remove(names: list[str], *, force: bool) -> int:
    for name in names:
        pykata.Named(name)          # one that is no name at all is refused before anything is removed
    code = 0
    for name in names:
        try:
            pykata.remove_volume(name, force=force)
        except pykata.PykataError as error:
            say(one_line(error))
            code = exits.NOT_ALL
        else:
            show(name)
    return code
