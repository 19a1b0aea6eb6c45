"""``pykata gc``."""

from __future__ import annotations

import argparse

import pykata
from pykata_cli.printing import show


async def command(arguments: argparse.Namespace) -> int:
    """Clean up, and say what was removed."""
    for path in await pykata.collect_garbage():
        show(f"removed {path}")
    return 0
