"""The commands that are about detached sandboxes."""

from __future__ import annotations

import argparse
from typing import Any

from pykata_cli import exits
from pykata_cli.parser_shared import add_format, add_identity, add_stdio, add_verbose, patience, seconds

EXEC = f"""\
examples:
  pykata exec worker -- ps
  pykata exec -it worker -- sh
  pykata exec -i worker -- sh -c 'cat > /tmp/input' < input
  pykata exec -e DEBUG=1 -w /srv worker -- ./migrate

exit codes:
  the command's own, 128 + N when signal N ended it, {exits.PYKATA} when pykata or the sandbox failed
"""
PS = """\
examples:
  pykata ps
  pykata ps --all --format json | jq -r '.[] | select(.phase == "ended") | .name'
"""
STOP = """\
examples:
  pykata stop worker
  pykata stop -t 60 database
"""
KILL = """\
examples:
  pykata kill worker
  pykata kill -s HUP worker       ask the command to read its configuration again
"""
LOGS = """\
examples:
  pykata logs worker
  pykata logs -f worker 2>/dev/null
"""
RM = """\
examples:
  pykata rm worker
"""
CP = """\
examples:
  pykata cp worker:/var/log/app.log .
  pykata cp ./data worker:/srv/data       what is in the directory ./data goes into /srv/data
  pykata cp worker:/srv/data - | tar -tv  as a tar
  tar -c . | pykata cp - worker:/srv      what is in a tar, which may be compressed
"""
STATS = """\
examples:
  pykata stats
  pykata stats --once --format json worker
"""
GC = """\
examples:
  pykata gc
"""


def add_detached(commands: Any) -> None:
    """All of them."""
    _add_exec(commands)
    _add_ps(commands)
    stop = _add(commands, "stop", "end detached sandboxes",
                "End detached sandboxes: SIGTERM for the main command, and SIGKILL if it doesn't end.", STOP)
    stop.add_argument(
        "-t", "--grace", metavar="SECONDS", type=patience, default=10.0, help="between the two; default: %(default)g"
    )
    _add_names(stop)
    kill = _add(commands, "kill", "send a signal to detached sandboxes",
                "Send a signal to the main command of detached sandboxes.", KILL)
    kill.add_argument("-s", "--signal", metavar="SIGNAL", default="KILL", help="name or number; default: %(default)s")
    _add_names(kill)
    logs = _add(commands, "logs", "show what a detached sandbox's command wrote",
                "Show what the main command of a detached sandbox wrote: the last 8 to 16 MiB of it.", LOGS)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the sandbox ends")
    logs.add_argument("name", metavar="NAME")
    _add_cp(commands)
    _add_stats(commands)
    remove = _add(commands, "rm", "forget detached sandboxes that have ended",
                  "Forget detached sandboxes that have ended: their logs, exit codes and names.", RM)
    _add_names(remove)
    _add(commands, "gc", "clean up after a crash",
         "Remove what killed processes left, run directories and detached sandboxes that were lost; images beyond the "
         "limit of the cache; and guest bundles that no sandbox was booted from for 30 days.", GC)


def _add(commands: Any, name: str, help: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=description, epilog=examples)
    add_verbose(parser)
    return parser


def _add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="+")


def _add_exec(commands: Any) -> None:
    parser = commands.add_parser(
        "exec", help="run a command in a detached sandbox", usage="pykata exec [OPTIONS] NAME [--] COMMAND ...",
        description="Run a command in the main container of a detached sandbox.", epilog=EXEC,
    )
    parser.add_argument("name", metavar="NAME", help="of the sandbox")
    parser.add_argument("cmd", metavar="COMMAND", nargs=argparse.REMAINDER, help="with its arguments")
    add_identity(parser)
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, help="kill the command after this time; what it wrote is kept"
    )
    add_stdio(parser)
    add_verbose(parser)


def _add_cp(commands: Any) -> None:
    parser = _add(commands, "cp", "copy files from or to a detached sandbox",
                  "Copy a file, or what is in a directory, from the main container of a detached sandbox or to it.", CP)
    parser.add_argument("source", metavar="SOURCE", help="NAME:PATH, or a path of this machine; -: a tar on stdin")
    parser.add_argument("target", metavar="TARGET", help="likewise; -: a tar to stdout")


def _add_stats(commands: Any) -> None:
    parser = _add(commands, "stats", "show what detached sandboxes use",
                  "Show what the containers of detached sandboxes use, every two seconds.", STATS)
    parser.add_argument("names", metavar="NAME", nargs="*", help="default: all that run")
    parser.add_argument("--once", action="store_true", help="look once")
    add_format(parser, "an object a line")


def _add_ps(commands: Any) -> None:
    parser = _add(commands, "ps", "list detached sandboxes", "List detached sandboxes.", PS)
    parser.add_argument("-a", "--all", action="store_true", help="those that have ended, too")
    add_format(parser, "times in seconds since 1970")
