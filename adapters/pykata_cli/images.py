"""``pykata images``."""

from __future__ import annotations

import argparse
import time

import pykata
from pykata_cli.tables import age, print_list, size

HEADER = ("NAME", "DIGEST", "ARCH", "SIZE", "USED")


async def command(arguments: argparse.Namespace) -> int:
    """Print the images that were pulled, those first that were used last."""
    images = await pykata.list_images()
    print_list(images, arguments.format, HEADER, row)
    return 0


def row(image: pykata.StoredImage) -> tuple[str, ...]:
    """An image in the table."""
    digest = image.digest.partition(":")[2][:12]
    return image.name, digest, image.architecture, size(image.size), f"{age(time.time() - image.used)} ago"
