"""What a process that runs beside a virtual machine says last."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import anyio

from pykata.errors import last_line, printable
from pykata.host.cleanup import finish
from pykata.host.process import HostProcess, describe_exit
from pykata.host.run import TAIL


class LastWords:
    """The end of a process's stderr, read all the time: a full pipe would stall it."""

    def __init__(self, process: HostProcess, name: str) -> None:
        self._process = process
        self._name = name
        self._tail = bytearray()
        self._reader = asyncio.ensure_future(self._follow())

    async def _follow(self) -> None:
        assert self._process.stderr is not None
        with suppress(anyio.EndOfStream, anyio.ClosedResourceError, OSError):
            while True:
                self._tail += await self._process.stderr.receive()
                del self._tail[:-TAIL]

    async def ended(self) -> str:
        """Wait until the process has ended; says how."""
        code = await self._process.wait()
        with anyio.move_on_after(1):
            await asyncio.wait({self._reader})
        how = f"{self._name} {describe_exit(code)}"
        words = last_line(self._tail.decode(errors="backslashreplace"))
        return f"{how}: {printable(words.encode())}" if words else how

    async def stop(self) -> None:
        """Read no more."""
        self._reader.cancel()
        await finish(_over(self._reader))


async def _over(task: asyncio.Future[None]) -> None:
    await asyncio.wait({task})
