"""Options that several commands have."""

from __future__ import annotations

import argparse
from typing import Any


def seconds(text: str) -> float:
    """A duration for argparse: a number above 0."""
    return _duration(text, "seconds, above 0")


def patience(text: str) -> float:
    """How long one waits: seconds, or 0 for not at all."""
    return _duration(text, "seconds, or 0 for not at all", zero=True)


def _duration(text: str, hint: str, *, zero: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if 0 < value < float("inf") or (zero and value == 0):
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a duration ({hint})")


def add_format(parser: Any, json: str) -> None:
    """``--format``: a table, or what ``json`` says of the other."""
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help=f"json: {json}; default: %(default)s"
    )


def add_verbose(parser: Any, **default: Any) -> None:
    """``-v``. Below a command that has it, too, ``default=argparse.SUPPRESS`` keeps that one's."""
    parser.add_argument(
        "-v", "--verbose", action="store_true", **default,
        help="tell the whole story on stderr: programs started, timings, the guest's console, tracebacks",
    )


def add_identity(group: Any) -> None:
    """In what environment and as whom a command runs."""
    group.add_argument(
        "-e", "--env", metavar="NAME[=VALUE]", action="append", default=[],
        help="set a variable; without a value: pass ours on; repeatable",
    )
    group.add_argument("-w", "--cwd", metavar="DIR", help="directory to run in")
    group.add_argument("-u", "--user", metavar="USER[:GROUP]", help="names or numbers")


def add_stdio(group: Any) -> None:
    """What becomes of stdin, and ``-t``."""
    group.add_argument(
        "-i", "--interactive", action="store_true", help="pass our stdin on even if it is a terminal"
    )
    group.add_argument("-t", "--tty", action="store_true", help="give the command a terminal; -it for a shell")
