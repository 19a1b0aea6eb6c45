"""The command line: ``pykata run``, ``pykata check``, ``pykata guest``. It uses the public names of pykata only."""

from __future__ import annotations

TYPE_CHECKING = False       # typing takes some milliseconds, in which Ctrl-C would end in a traceback
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``pykata``; returns its exit code."""
    try:
        from pykata_cli.cli import main

        return main(argv)
    except KeyboardInterrupt:       # also while modules are imported
        return 130                  # 128 and the number of SIGINT, as shells have it
