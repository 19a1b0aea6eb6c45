"""From the command line to an exit code. Each command is imported when it is asked for: ``--help`` needs none."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Coroutine, Sequence
from importlib import import_module
from typing import Any

from pykata_cli import exits
from pykata_cli.parser import parse

EMULATION = (
    "no usable KVM: the guest is emulated, which QEMU doesn't count as a security boundary "
    "(--isolation hardware refuses that, --isolation emulated accepts it)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``pykata``; returns its exit code."""
    _fill_stdio()
    arguments = parse(argv)
    if arguments.version:
        from importlib.metadata import version

        print(f"pykata {version('pykata')}")
        return 0
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return exits.SIGNAL + 2
    except BaseException as exc:
        from pykata_cli.complaint import complain

        if isinstance(exc, SystemExit):
            raise
        return complain(exc, verbose=arguments.verbose)


def _run(arguments: argparse.Namespace) -> int:
    import anyio

    if arguments.verbose:
        _log_everything()
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # it ignores where the warning comes from
    command: Callable[[argparse.Namespace], Coroutine[Any, Any, int]]
    command = import_module(f"pykata_cli.{arguments.command}").command
    return anyio.run(command, arguments)


def _show_warning(message: Warning | str, category: type[Warning], *_where: object) -> None:
    # By name: pykata need not be imported for this.
    text = EMULATION if category.__name__ == "EmulationWarning" else message
    print(f"pykata: warning: {text}", file=sys.stderr)


def _fill_stdio() -> None:
    # A descriptor that the caller closed would be given to the first file we open.
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _log_everything() -> None:
    import logging

    logging.basicConfig(format="%(relativeCreated)6.0f ms %(name)s: %(message)s")
    logging.getLogger("pykata").setLevel(logging.DEBUG)
