"""``pykata rmi``."""

from __future__ import annotations

import argparse

import pykata
from pykata_cli.printing import show
from pykata_cli.tables import size


async def command(arguments: argparse.Namespace) -> int:
    """Remove images; prints what that gave back."""
    for name in arguments.images:
        show(f"{name}: {size(await pykata.remove_image(name))}")
    return 0
