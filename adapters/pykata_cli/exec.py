"""``pykata exec``."""

from __future__ import annotations

import argparse

import pykata
from pykata_cli.signals import Relay, relayed
from pykata_cli.streams import Streams, environment, forward_stdin
from pykata_cli.terminal import size


async def command(arguments: argparse.Namespace) -> int:
    """Run the command in the sandbox; returns its exit code."""
    if not arguments.cmd:
        raise pykata.ConfigError("there is no command to run", hint=f"pykata exec {arguments.name} -- COMMAND")
    return await relayed(_in_sandbox, arguments)


async def _in_sandbox(arguments: argparse.Namespace, relay: Relay) -> int:
    options = {"env": environment(arguments.env), "cwd": arguments.cwd, "user": arguments.user}
    async with (
        pykata.Sandbox.connect(arguments.name) as sandbox,
        sandbox.main.process(arguments.cmd, **options, tty=arguments.tty and size()) as process,
    ):
        relay.process = process
        return await Streams(process, forward_stdin(arguments), arguments.tty).run(arguments.timeout)
