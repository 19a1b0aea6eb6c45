"""What runs in a container of :class:`~pykata.testing.FakeAgent`: coroutines in place of programs."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

import anyio

from pykata.testing.process import PIECE, FakeProcess

Command = Callable[[FakeProcess], Awaitable[int]]
"""A program: takes its process, returns its exit code. It is cancelled when the process is killed."""


async def true(process: FakeProcess) -> int:
    return 0


async def false(process: FakeProcess) -> int:
    return 1


async def echo(process: FakeProcess) -> int:
    await process.write(" ".join(process.args[1:]).encode() + b"\n")
    return 0


async def cat(process: FakeProcess) -> int:
    while data := await process.read():
        await process.write(data)
    return 0


async def sleep(process: FakeProcess) -> int:
    seconds = process.args[1] if len(process.args) > 1 else "0"
    await anyio.sleep(math.inf if seconds == "infinity" else float(seconds))
    return 0


async def yes(process: FakeProcess) -> int:
    line = (" ".join(process.args[1:]) or "y").encode() + b"\n"
    block = line * max(1, PIECE // len(line))
    while True:
        await process.write(block)


async def env(process: FakeProcess) -> int:
    await process.write("".join(f"{name}={value}\n" for name, value in process.env.items()).encode())
    return 0


BUILTINS: Mapping[str, Command] = MappingProxyType(
    {"true": true, "false": false, "echo": echo, "cat": cat, "sleep": sleep, "yes": yes, "env": env}
)
"""The programs that every container has, by ``args[0]``."""
