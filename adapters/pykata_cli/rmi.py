"""``pykata rmi``."""

from __future__ import annotations

import argparse

import pykata
from pykata_cli.images import megabytes
from pykata_cli.printing import show


async def command(arguments: argparse.Namespace) -> int:
    """Remove images; prints what that gave back."""
    for name in arguments.images:
        show(f"{name}: {megabytes(await pykata.remove_image(name))}")
    return 0
