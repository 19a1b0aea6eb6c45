"""The programs that share directories: how they are launched, and what they say."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import anyio

from pykata import host
from pykata.errors import last_line, printable
from pykata.spec import Shared

ENTER = Path(__file__).with_name("enter.py")


def entered(
    root: Path, shares: Sequence[Shared], shelf: socket.socket | None, program: Sequence[str] = ()
) -> list[str]:
    """The argv of ``program`` in namespaces in which ``shares`` are side by side below ``root``: see enter.py."""
    plan = {
        "root": str(root),
        "shares": [
            (share.name, os.fsdecode(share.path), "ro" if share.readonly else "rw",
             "dir" if share.path.is_dir() else "file")
            for share in shares
        ],
        "shelf": None if shelf is None else shelf.fileno(),
    }  # fmt: skip
    return [sys.executable, "-I", "-S", str(ENTER), json.dumps(plan), *program]


class Said:
    """What a program says last, read all the time: a full pipe would stall it."""

    def __init__(self, process: host.HostProcess, name: str = "virtiofsd") -> None:
        self._name = name
        self._process = process
        self._tail = bytearray()
        self._reader = asyncio.ensure_future(self._follow())

    async def _follow(self) -> None:
        assert self._process.stderr is not None
        with suppress(anyio.EndOfStream, anyio.ClosedResourceError, OSError):
            while True:
                self._tail += await self._process.stderr.receive()
                del self._tail[:-host.TAIL]

    async def ended(self) -> str:
        """Wait until it has ended; says how."""
        code = await self._process.wait()
        with anyio.move_on_after(1):
            await asyncio.wait({self._reader})
        how = f"{self._name} {host.describe_exit(code)}"
        words = last_line(self._tail.decode(errors="backslashreplace"))
        return f"{how}: {printable(words.encode())}" if words else how

    async def stop(self) -> None:
        self._reader.cancel()
        await host.finish(_over(self._reader))


async def _over(task: asyncio.Future[None]) -> None:
    await asyncio.wait({task})
