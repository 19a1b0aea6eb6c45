"""Options that several commands have."""

from __future__ import annotations

from typing import Any


def add_verbose(parser: Any) -> None:
    """``-v``."""
    parser.add_argument(
        "-v", "--verbose", action="store_true",
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
