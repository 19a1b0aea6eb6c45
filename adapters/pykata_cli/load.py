"""``pykata load``."""

from __future__ import annotations

import argparse

import pykata


async def command(arguments: argparse.Namespace) -> int:
    """Keep an image that is elsewhere on this machine; prints its name."""
    print(await pykata.load_image(arguments.source, arguments.tag, architecture=arguments.arch))
    return 0
