"""How long a command takes in a container that runs: ``true``, from the call to its exit.

The floor is the same command with ``subprocess`` on the host, of which nothing is emulated.
"""

from __future__ import annotations

import time

import anyio

import pykata
from benchmarks._table import Row, interleaved, main, row


async def measure(rounds: int) -> list[Row]:
    """Rows for a container that stays, and for a new one each time."""
    async with (
        pykata.Sandbox(isolation="emulated") as sandbox,
        sandbox.container("builtin:busybox") as container,
    ):

        async def kept() -> float:
            began = time.perf_counter()
            await container.run(["true"], check=True)
            return (time.perf_counter() - began) * 1000

        async def fresh() -> float:
            began = time.perf_counter()
            await sandbox.run("builtin:busybox", ["true"], check=True)
            return (time.perf_counter() - began) * 1000

        async def host() -> float:
            began = time.perf_counter()
            await anyio.run_process(["true"])
            return (time.perf_counter() - began) * 1000

        await interleaved(3, kept, fresh, host)
        in_kept, in_fresh, on_host = await interleaved(rounds, kept, fresh, host)
    return [row("exec in a container", "ms", in_kept, on_host), row("run in a new container", "ms", in_fresh, on_host)]


if __name__ == "__main__":
    main(measure, rounds=50, about=__doc__)
