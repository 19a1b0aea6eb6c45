"""The command line: ``pykata run``, ``pykata check``, ``pykata guest``. It uses the public names of pykata only."""

from pykata_cli.cli import main

__all__ = ["main"]
