"""``pykata load``."""

from __future__ import annotations

import argparse

import pykata
from pykata_cli.printing import show


async def command(arguments: argparse.Namespace) -> int:
    """Keep an image that is elsewhere on this machine; prints its name."""
    show(await pykata.load_image(arguments.source, arguments.tag, architecture=arguments.architecture))
    return 0
