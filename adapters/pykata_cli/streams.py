"""A command's stdio, connected to ours, until it ends."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext

import anyio
from attrs import define, field

import pykata
from pykata_cli import exits, stdio, terminal
from pykata_cli.complaint import one_line
from pykata_cli.printing import say

DRAIN = 10.0
"""Seconds that the guest has for each piece of a killed command's last output."""


@define
class Streams:
    """The command's stdio, connected to ours."""

    process: pykata.Process
    stdin: bool
    tty: bool = False
    pipe_broken: bool = False
    _killed_at: float = math.inf
    _waits: dict[int, anyio.CancelScope] = field(factory=dict)

    async def run(self, timeout: float | None) -> int:
        """Pass everything on until the command ends; returns the exit code for it."""
        with self._terminal():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._feed)
                tasks.start_soon(self._kill_after, math.inf if timeout is None else timeout)
                if self.tty:
                    tasks.start_soon(terminal.follow_size, self.process)
                await self._drain(tasks.cancel_scope)
                tasks.cancel_scope.cancel()
        if self.pipe_broken:
            return exits.SIGNAL + exits.SIGPIPE       # who read our output has left; so would a local command
        if self._killed_at < math.inf:
            say(f"the command was killed: its {timeout:g} s were over")
            return exits.TIMEOUT
        code = await self.process.wait()
        if self.process.exited is not None and self.process.exited.oom_killed:
            say("the command was killed: memory ran out (--memory gives it more)")
        if self.process.lost is not None:
            say(one_line(self.process.lost))
            return code or exits.PYKATA     # that it ended well doesn't say that what it wrote has arrived
        return code

    def _terminal(self) -> AbstractContextManager[None]:
        # A terminal that isn't read stays as it is, so that Ctrl-C still comes to us, and goes to the command.
        return terminal.raw(stdio.STDIN) if self.tty and self.stdin else nullcontext()

    async def _feed(self) -> None:
        if self.stdin:
            async for data in stdio.read(stdio.STDIN):
                await self.process.stdin.send(data)
        if self.stdin or not self.tty:      # the end of a terminal that nobody reads would be a Ctrl-D
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


def forward_stdin(arguments: argparse.Namespace) -> bool:
    """A terminal is only read when asked for: the user may be typing the next command."""
    return bool(arguments.interactive) or not os.isatty(stdio.STDIN)


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
