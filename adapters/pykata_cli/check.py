"""``pykata check``."""

from __future__ import annotations

import argparse

import pykata
from pykata_cli import exits
from pykata_cli.printing import show


async def command(arguments: argparse.Namespace) -> int:
    """Print what was found, with the remedy for what is missing."""
    report = await pykata.check()
    width = max((len(item.name) for item in report.items), default=0)
    for item in report.items:
        show(f"{'ok  ' if item.ok else 'FAIL'}  {item.name:{width}}  {item.detail}")
        if not item.ok and item.remedy:
            show(f"      {'':{width}}  {item.remedy}")
    return 0 if all(item.ok for item in report.items) else exits.UNHEALTHY
