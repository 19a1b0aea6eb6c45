"""``pykata push``."""

from __future__ import annotations

import argparse

import pykata
from pykata_cli.printing import show
from pykata_cli.pull import registries


async def command(arguments: argparse.Namespace) -> int:
    """Put an image into a registry; prints its digest."""
    show(await pykata.push_image(arguments.image, arguments.to, registries=registries(arguments)))
    return 0
