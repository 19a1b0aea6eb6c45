"""What importing pykata, its Sandbox, and ``pykata --version`` take, beside an interpreter that does nothing."""

from __future__ import annotations

import subprocess
import sys
import time

import anyio

from benchmarks._table import Row, interleaved, main, row


def command(*argv: str) -> float:
    """Milliseconds that a program takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1000


async def measure(rounds: int) -> list[Row]:
    """One row for each entry into pykata."""

    async def floor() -> float:
        return await anyio.to_thread.run_sync(command, "-c", "pass")

    async def package() -> float:
        return await anyio.to_thread.run_sync(command, "-c", "import pykata")

    async def sandbox() -> float:
        return await anyio.to_thread.run_sync(command, "-c", "from pykata import Sandbox")

    async def command_line() -> float:
        return await anyio.to_thread.run_sync(command, "-m", "pykata_cli", "--version")

    nothing, *measured = await interleaved(rounds, floor, package, sandbox, command_line)
    names = ("import pykata", "from pykata import Sandbox", "pykata --version")
    return [row(name, "ms", times, nothing) for name, times in zip(names, measured, strict=True)]


if __name__ == "__main__":
    main(measure, rounds=20, about=__doc__)
