"""``pykata images``."""

from __future__ import annotations

import argparse
import json
import time

import pykata
from pykata_cli.printing import show

UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


async def command(arguments: argparse.Namespace) -> int:
    """Print the images that were pulled, those first that were used last."""
    images = await pykata.list_images()
    if arguments.json:
        names = ("name", "digest", "architecture", "size", "used")
        show(json.dumps([{name: getattr(image, name) for name in names} for image in images], indent=2))
        return 0
    lines = [("NAME", "DIGEST", "ARCH", "SIZE", "USED")]
    for image in images:
        digest = image.digest.partition(":")[2][:12]
        lines.append((image.name, digest, image.architecture, megabytes(image.size), ago(time.time() - image.used)))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    for line in lines:
        show("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e6:.1f} MB"


def ago(seconds: float) -> str:
    """How long ago something was, in its largest unit."""
    for length, unit in UNITS:
        if seconds >= length:
            return f"{int(seconds // length)} {unit} ago"
    return "now"
