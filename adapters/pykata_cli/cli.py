"""From the command line to an exit code. Each command is imported when it is asked for: ``--help`` needs none."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Coroutine, Sequence
from importlib import import_module
from typing import Any

from pykata_cli import exits
from pykata_cli.parser import parse
from pykata_cli.printing import open_streams, say, show

EMULATION = (
    "no usable KVM: the guest is emulated, which QEMU doesn't count as a security boundary "
    "(--isolation hardware refuses that, --isolation emulated accepts it)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``pykata``; returns its exit code."""
    open_streams()
    verbose = False
    try:
        arguments = parse(argv)
        verbose = bool(getattr(arguments, "verbose", False))
        return _run(arguments)
    except KeyboardInterrupt:
        return exits.SIGNAL + 2
    except SystemExit:
        raise
    except BaseException as exc:
        from pykata_cli.complaint import complain

        return complain(exc, verbose=verbose)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.version:
        from importlib.metadata import version

        show(f"pykata {version('pykata')}")
        return 0
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
    say(f"warning: {text}")


def _log_everything() -> None:
    import logging

    logging.basicConfig(format="%(relativeCreated)6.0f ms %(name)s: %(message)s")
    logging.getLogger("pykata").setLevel(logging.DEBUG)
