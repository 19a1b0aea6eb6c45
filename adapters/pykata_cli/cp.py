"""``pykata cp``."""

from __future__ import annotations

import argparse
import sys

import pykata
from pykata_cli.signals import Relay, relayed

HINT = "pykata cp NAME:PATH HOST, or pykata cp HOST NAME:PATH; a path of this machine with a colon needs a ./ before it"


async def command(arguments: argparse.Namespace) -> int:
    """Copy from the sandbox to the host, or the other way."""
    source, target = split(arguments.source), split(arguments.target)
    if (source is None) == (target is None):
        raise pykata.ConfigError("one of the two paths must be of a sandbox, and the other of this machine", hint=HINT)
    if "-" in (arguments.source, arguments.target):
        raise pykata.ConfigError("cp copies files and directories, not streams", hint="./- is a file of that name")
    return await relayed(_copy, arguments)


async def _copy(arguments: argparse.Namespace, relay: Relay) -> int:
    source, target = split(arguments.source), split(arguments.target)
    name, path = source or target or ("", "")
    async with pykata.Sandbox.connect(name) as sandbox:
        if source is not None:
            moved = await sandbox.main.files.download(path, arguments.target)
        else:
            moved = await sandbox.main.files.upload(arguments.source, path)
    for skipped in moved.skipped:
        print(f"pykata: left out, as it is no file, directory or link: {skipped!r}", file=sys.stderr)
    return 0


def split(text: str) -> tuple[str, str] | None:
    """The sandbox and the path in ``NAME:PATH``; None for a path of this machine."""
    name, colon, path = text.partition(":")
    return (name, path or ".") if colon and "/" not in name else None
