"""``pykata stop``."""

from __future__ import annotations

import argparse

import pykata
from pykata_cli.each import each


async def command(arguments: argparse.Namespace) -> int:
    """End each of them, and wait for that."""

    async def stop(sandbox: pykata.Detached) -> None:
        await sandbox.stop(grace=arguments.grace)

    return await each(arguments.names, stop)
