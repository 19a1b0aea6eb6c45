"""``pykata guest``."""

from __future__ import annotations

import argparse
import sys

import pykata
from pykata_cli.printing import show
from pykata_cli.progress import progress
from pykata_cli.signals import Relay, relayed


async def command(arguments: argparse.Namespace) -> int:
    """Build or describe the guest bundle."""
    if arguments.verb == "build":
        return await relayed(_build, arguments)
    tell(pykata.find_bundle())
    return 0


async def _build(arguments: argparse.Namespace, _relay: Relay) -> int:
    with progress(sys.stderr) as report:
        tell(await pykata.build_bundle(progress=report, force=arguments.force))
    return 0


def tell(bundle: pykata.Bundle) -> None:
    """Print what a bundle is."""
    for name, value in describe(bundle).items():
        show(f"{name:12} {value}")


def describe(bundle: pykata.Bundle) -> dict[str, str]:
    """What a bundle is, in words."""
    said = {"path": str(bundle.path), "architecture": bundle.architecture, "hash": bundle.hash}
    sizes = {name: f"{output['size'] / 2**20:.1f} MiB" for name, output in bundle.manifest["outputs"].items()}
    return {**said, "files": ", ".join(f"{name} {size}" for name, size in sorted(sizes.items()))}
