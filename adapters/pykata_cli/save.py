"""``pykata save``."""

from __future__ import annotations

import argparse

import pykata


async def command(arguments: argparse.Namespace) -> int:
    """Write an image to disk."""
    await pykata.save_image(arguments.image, arguments.path)
    return 0
