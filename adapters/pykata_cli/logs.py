"""``pykata logs``."""

from __future__ import annotations

import argparse
from contextlib import aclosing

import pykata
from pykata_cli import exits, stdio


async def command(arguments: argparse.Namespace) -> int:
    """Write what the command wrote to where it wrote it: stdout or stderr."""
    sandbox = pykata.find_detached(arguments.name)
    try:
        async with aclosing(sandbox.logs(follow=arguments.follow)) as pieces:
            async for piece in pieces:
                await stdio.write(stdio.STDOUT if piece.stream == "stdout" else stdio.STDERR, piece.data)
    except BrokenPipeError:
        return exits.SIGNAL + exits.SIGPIPE
    return 0
