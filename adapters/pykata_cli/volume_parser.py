"""What can be written on the command line about named volumes."""

from __future__ import annotations

import argparse
from typing import Any

from pykata_cli import exits
from pykata_cli.parser_shared import add_format, add_verbose

EXAMPLES = """\
examples:
  pykata volumes
  pykata volumes --format json | jq -r '.[] | select(.in_use) | .name'
  pykata volumes rm cache results
"""
RM_EXAMPLES = f"""\
examples:
  pykata volumes rm cache results
  pykata volumes rm --force cache       even if a sandbox uses it

exit codes:
  0 when all are removed, {exits.NOT_ALL} when one isn't there or is used (the others are removed),
  {exits.PYKATA} when one of them is no name (nothing is removed)
"""


def add_volumes(commands: Any) -> None:
    """``volumes`` and ``volumes rm``."""
    volumes = commands.add_parser(
        "volumes", help="the volumes that have a name, which outlive sandboxes",
        description="List the named volumes, or remove some.", epilog=EXAMPLES,
    )
    add_format(volumes, "sizes in bytes, times in seconds since 1970")
    add_verbose(volumes)
    verbs = volumes.add_subparsers(dest="verb", metavar="VERB", title="verbs (without one: list them)")
    rm = verbs.add_parser(
        "rm", help="remove volumes and all that is in them", description="Remove volumes and all that is in them.",
        epilog=RM_EXAMPLES,
    )
    rm.add_argument("names", metavar="NAME", nargs="+", help="as in --volume NAME:PLACE")
    rm.add_argument("-f", "--force", action="store_true", help="remove those that a sandbox uses, too")
    add_verbose(rm, default=argparse.SUPPRESS)
