"""``pykata ps``."""

from __future__ import annotations

import argparse
import shlex
import time

import pykata
from pykata_cli.tables import age, print_list

HEADER = ("NAME", "STATUS", "AGE", "IMAGE", "COMMAND")
COMMAND = 40        # characters of a command that are shown


async def command(arguments: argparse.Namespace) -> int:
    """List what there is."""
    found = [one for one in pykata.list_detached() if arguments.all or one.phase != "ended"]
    print_list(found, arguments.format, HEADER, row)
    return 0


def row(one: pykata.Detached) -> tuple[str, ...]:
    """A sandbox in the table."""
    words = shlex.join(one.args)
    return (one.name, status(one), age(time.time() - one.created), one.image or "-",
            words if len(words) <= COMMAND else words[: COMMAND - 1] + "…")


def status(one: pykata.Detached) -> str:
    """How it does, in a few words."""
    if one.phase == "ended" and one.lost:
        return f"ended ({one.exit_code}, files lost)"
    if one.phase == "ended":
        return f"ended ({one.exit_code})" if one.exit_code is not None else f"ended ({one.reason or 'stopped'})"
    return "lost (keeper killed)" if one.phase == "lost" else one.phase
