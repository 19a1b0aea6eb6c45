"""``pykata images``."""

from __future__ import annotations

import argparse
import json
import time

from attrs import asdict

import pykata
from pykata_cli.printing import show
from pykata_cli.tables import age, print_table, size

HEADER = ("NAME", "DIGEST", "ARCH", "SIZE", "USED")


async def command(arguments: argparse.Namespace) -> int:
    """Print the images that were pulled, those first that were used last."""
    images = await pykata.list_images()
    if arguments.format == "json":
        show(json.dumps([asdict(image) for image in images], indent=2))
    else:
        print_table([HEADER, *(row(image) for image in images)])
    return 0


def row(image: pykata.StoredImage) -> tuple[str, ...]:
    """An image in the table."""
    digest = image.digest.partition(":")[2][:12]
    return image.name, digest, image.architecture, size(image.size), f"{age(time.time() - image.used)} ago"
