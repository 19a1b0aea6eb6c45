"""What the tests of whole sandboxes share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from time import time
from typing import Any

import anyio
import pytest

import pykata.boot
from pykata import Completed, Container, Sandbox
from pykata.agent.v1 import StatsResponse
from pykata.guest import Bundle
from tests.places import places as places

BUSYBOX = "builtin:busybox"


@asynccontextmanager
async def shared(bundle: Bundle, **options: Any) -> AsyncIterator[Sandbox]:
    """A sandbox for several tests. Nothing goes on in it between them, so that what one has left is told from that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYKATA_BUNDLE", str(bundle.path))
        patch.setattr(pykata.boot, "expecting", nullcontext)
        patch.setattr(pykata.boot, "in_background", nullcontext)
        async with Sandbox(isolation="emulated", **options) as sandbox:
            yield sandbox


@pytest.fixture(scope="module")
async def sb(bundle: Bundle, anyio_backend: str) -> AsyncIterator[Sandbox]:
    """A sandbox that all tests of a file use, one after the other."""
    async with shared(bundle, hostname="shared") as sandbox:
        yield sandbox


async def clocked(where: Sandbox | Container, script: str) -> list[str]:
    """The lines that a script writes; the guest's clock is within a second of the host's, however long that took."""
    before = time()
    script = f"date +%s; {script}; date +%s"
    argv = ["sh", "-c", script]
    done = await (where.run(argv, check=True) if isinstance(where, Container) else where.run(BUSYBOX, argv, check=True))
    after = time()
    first, *lines, last = done.stdout.splitlines()
    # It shows whole seconds, so one that is right shows up to one less.
    assert int(first) + 1 > before - 1, f"{before - int(first):.1f} s late"
    assert int(last) < after + 1, f"{int(last) - after:.1f} s early"
    return lines


async def cut_off(run: Callable[[float], Awaitable[Completed]], stdout: str, stderr: str = "") -> Completed:
    """A command whose time is up after it has said this: a slow machine needs more of it than another one."""
    for seconds in (1.0, 10.0, 60.0):
        done = await run(seconds)
        assert done.reason == "timeout"
        if (done.stdout, done.stderr) == (stdout, stderr):
            return done
        assert stdout.startswith(done.stdout)
        assert stderr.startswith(done.stderr)
    raise AssertionError(f"in a minute it has said {done.stdout!r} and {done.stderr!r}")


async def idle(sb: Sandbox) -> StatsResponse:
    """What the agent has when it has nothing left to do: it closes what a command had when nobody waits any more."""
    assert sb._running is not None
    agent = sb._running.agent
    last, again = await agent.stats(), 0
    while again < 3:
        await anyio.sleep(0.02)
        now = await agent.stats()
        last, again = now, again + 1 if now.open_files == last.open_files else 0
    return last


def until(command: str) -> str:
    """A script that tries this again and again: on a busy machine who is asked may answer too late for ARP."""
    return f"until {command}; do :; done"


async def told(sb: Sandbox, script: str) -> str:
    """What a script writes to stdout and to stderr."""
    done = await sb.shell(BUSYBOX, script, timeout=600)
    return (done.stdout + done.stderr).strip()
