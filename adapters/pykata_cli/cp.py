"""``pykata cp``."""

from __future__ import annotations

import argparse
import os
from functools import partial

import pykata
from pykata_cli import exits, stdio
from pykata_cli.printing import say
from pykata_cli.signals import Relay, relayed

HINT = "pykata cp NAME:PATH HOST, or pykata cp HOST NAME:PATH; a path of this machine with a colon needs a ./ before it"

STREAM = "-"
"""In place of a path of this machine: a tar on stdin or stdout."""


async def command(arguments: argparse.Namespace) -> int:
    """Copy from the sandbox to the host, or the other way."""
    source, target = split(arguments.source), split(arguments.target)
    if (source is None) == (target is None):
        raise pykata.ConfigError("one of the two paths must be of a sandbox, and the other of this machine", hint=HINT)
    if arguments.target == STREAM and os.isatty(stdio.STDOUT):
        raise pykata.ConfigError("stdout is a terminal, and no place for a tar", hint="pykata cp NAME:PATH - | tar -t")
    return await relayed(_copy, arguments)


async def _copy(arguments: argparse.Namespace, relay: Relay) -> int:
    source, target = split(arguments.source), split(arguments.target)
    name, path = source or target or ("", "")
    async with pykata.Sandbox.connect(name) as sandbox:
        files = sandbox.main.files
        try:
            if arguments.target == STREAM:
                moved = await files.download_tar(path, partial(stdio.write, stdio.STDOUT))
            elif arguments.source == STREAM:
                moved = await files.upload_tar(partial(anext, stdio.read(stdio.STDIN), b""), path)
            elif source is not None:
                moved = await files.download(path, arguments.target)
            else:
                moved = await files.upload(arguments.source, path)
        except BrokenPipeError:
            return exits.SIGNAL + exits.SIGPIPE       # who read the tar has left
    for skipped in moved.skipped:
        say(f"left out, as it is no file, directory or link: {skipped!r}")
    return 0


def split(text: str) -> tuple[str, str] | None:
    """The sandbox and the path in ``NAME:PATH``; None for a path of this machine."""
    name, colon, path = text.partition(":")
    return (name, path or ".") if colon and "/" not in name else None
