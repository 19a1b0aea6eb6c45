"""``pykata kill``."""

from __future__ import annotations

import argparse
import re
import signal

import pykata
from pykata_cli.each import each


async def command(arguments: argparse.Namespace) -> int:
    """Send the signal to each of them."""
    number = signal_number(arguments.signal)

    async def kill(sandbox: pykata.Detached) -> None:
        await sandbox.send_signal(number)

    return await each(arguments.names, kill)


def signal_number(text: str) -> int:
    """A signal by its number or its name, with or without SIG."""
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    name = f"SIG{text.upper().removeprefix('SIG')}"
    try:
        return signal.Signals[name]
    except KeyError:
        raise pykata.ConfigError(f"there is no signal {text!r}", hint="such as KILL, TERM, HUP, or a number") from None
