"""``pykata run``."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
from attrs import define, field

import pykata
from pykata_cli import exits, stdio
from pykata_cli.signals import RELAYED, Relay

log = logging.getLogger("pykata.cli")

SIGPIPE = 13
DRAIN = 10.0
"""Seconds that the guest has for each piece of a killed command's last output."""


async def command(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code, or one of :mod:`pykata_cli.exits`."""
    # The receiver outlives the sandbox: an impatient Ctrl-C must not interrupt the clean-up.
    with anyio.open_signal_receiver(*RELAYED) as signals:
        async with anyio.create_task_group() as tasks:
            relay = Relay(tasks.cancel_scope)
            tasks.start_soon(relay.serve, signals)
            code = await _in_sandbox(arguments, relay)
            tasks.cancel_scope.cancel()
    return exits.SIGNAL + relay.ended_by if relay.ended_by else code


async def _in_sandbox(arguments: argparse.Namespace, relay: Relay) -> int:
    async with pykata.Sandbox(**sandbox_options(arguments)) as sandbox:
        async with _process(sandbox, arguments) as process:
            relay.process = process
            code = await Streams(process, forward_stdin(arguments)).run(arguments.timeout)
        log.debug("%s, %s isolation, %s", sandbox.accel, sandbox.isolation, sandbox.timings)
    return code


def _process(sandbox: pykata.Sandbox, arguments: argparse.Namespace) -> AbstractAsyncContextManager[pykata.Process]:
    options: dict[str, Any] = {"env": environment(arguments.env), "cwd": arguments.cwd, "user": arguments.user}
    if arguments.entrypoint is not None:
        options["entrypoint"] = [arguments.entrypoint] if arguments.entrypoint else []
    return sandbox.process(arguments.image, arguments.cmd or None, **options)


@define
class Streams:
    """The command's stdio, connected to ours."""

    process: pykata.Process
    stdin: bool
    pipe_broken: bool = False
    _killed_at: float = math.inf
    _waits: dict[int, anyio.CancelScope] = field(factory=dict)

    async def run(self, timeout: float | None) -> int:
        """Pass everything on until the command ends; returns the exit code for it."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._feed)
            tasks.start_soon(self._kill_after, math.inf if timeout is None else timeout)
            await self._drain(tasks.cancel_scope)
            tasks.cancel_scope.cancel()
        if self.pipe_broken:
            return exits.SIGNAL + SIGPIPE       # who read our output has left; so would a local command
        if self._killed_at < math.inf:
            _say(f"the command was killed: its {timeout:g} s were over")
            return exits.TIMEOUT
        code = await self.process.wait()
        if self.process.exited is not None and self.process.exited.oom_killed:
            _say("the command was killed: memory ran out (--memory gives it more)")
        return code

    async def _feed(self) -> None:
        if self.stdin:
            async for data in stdio.read(stdio.STDIN):
                await self.process.stdin.send(data)
        await self.process.stdin.aclose()

    async def _kill_after(self, timeout: float) -> None:
        await anyio.sleep(timeout)
        self._killed_at = anyio.current_time()
        await self.process.kill()
        for wait in self._waits.values():
            wait.deadline = self._killed_at + DRAIN

    async def _drain(self, scope: anyio.CancelScope) -> None:
        async def copy(output: AsyncIterator[bytes], fd: int) -> None:
            try:
                while (piece := await self._next(output, fd)) is not None:
                    await stdio.write(fd, piece)
            except BrokenPipeError:
                self.pipe_broken = True
                scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(copy, self.process.stdout, stdio.STDOUT)
            tasks.start_soon(copy, self.process.stderr, stdio.STDERR)

    async def _next(self, output: AsyncIterator[bytes], fd: int) -> bytes | None:
        # It is the guest that has to hurry after a kill, not whoever reads what we write: nothing gets lost by that.
        with anyio.CancelScope(deadline=self._killed_at + DRAIN) as self._waits[fd]:
            return await anext(output, None)
        return None


def sandbox_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of the Sandbox: only what was said, so that the defaults are the library's."""
    names = ("fs", "network", "memory", "cpus", "disk", "hostname", "isolation")
    said = {name: getattr(arguments, name) for name in names}
    return {
        "hypervisor": hypervisor(arguments),
        **{name: value for name, value in said.items() if value is not None},
    }


def hypervisor(arguments: argparse.Namespace) -> Any:
    """The hypervisor by its name, or as a value where an option of its kind was given."""
    said = {name: value for name in ("machine", "accel") if (value := getattr(arguments, name)) is not None}
    if not said:
        return arguments.hypervisor
    if arguments.hypervisor != "qemu":
        raise pykata.ConfigError(f"{' and '.join(f'--{name}' for name in said)} isn't for {arguments.hypervisor}")
    return pykata.QEMU(**said)


def environment(items: list[str]) -> dict[str, str]:
    """``NAME=VALUE``, and ``NAME`` for ours; one that we don't have is left out, as docker does."""
    env = {}
    for item in items:
        name, equals, value = item.partition("=")
        if equals:
            env[name] = value
        elif name in os.environ:
            env[name] = os.environ[name]
    return env


def forward_stdin(arguments: argparse.Namespace) -> bool:
    """A terminal is only read when asked for: the user may be typing the next command."""
    return bool(arguments.interactive) or not os.isatty(stdio.STDIN)


def _say(text: str) -> None:
    print(f"pykata: {text}", file=sys.stderr)
