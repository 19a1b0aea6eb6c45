"""``pykata rm``."""

from __future__ import annotations

import argparse

from pykata_cli.each import each


async def command(arguments: argparse.Namespace) -> int:
    """Forget each of them."""
    return await each(arguments.names, lambda sandbox: sandbox.remove())
