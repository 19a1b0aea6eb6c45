"""``pykata pull``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pykata
from pykata_cli.bars import bars
from pykata_cli.printing import show


async def command(arguments: argparse.Namespace) -> int:
    """Pull an image; prints its digest."""
    with bars(sys.stderr) as pulling:
        image = await pykata.pull_image(
            arguments.image, registries=registries(arguments), progress=None if arguments.quiet else pulling,
            architecture=arguments.architecture,
        )
    show(image.digest)
    return 0


def registries(arguments: argparse.Namespace) -> pykata.Registries | None:
    """What was said about registries."""
    if not arguments.insecure and not arguments.ca_file:
        return None
    ca_file = Path(arguments.ca_file) if arguments.ca_file else None
    return pykata.Registries(insecure=tuple(arguments.insecure), ca_file=ca_file)
