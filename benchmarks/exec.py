"""How long a command takes in a container that runs: ``true``, from the call to its exit.

The floor is what the guest itself needs: a small static program in the same container that forks, executes the same
``true`` and waits for it, over and over. For comparison there is also ``true`` as a process of the host, of which
nothing is emulated. In new containers they come one right after the other, so each waits for what the guest does when
the last one has ended.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

import anyio

import pykata
from benchmarks._table import Row, interleaved, main, row

PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
int main(int argc, char **argv) {
    (void)argc;
    for (int round = atoi(argv[1]); round > 0; round--) {
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        pid_t pid = fork();
        if (pid == 0) { execv(argv[2], argv + 2); _exit(127); }
        int status;
        if (waitpid(pid, &status, 0) != pid || status != 0) return 1;
        clock_gettime(CLOCK_MONOTONIC, &to);
        printf("%ld\n", (to.tv_sec - from.tv_sec) * 1000000000L + to.tv_nsec - from.tv_nsec);
    }
    return 0;
}
"""
IN_GUEST = 10
"""Rounds of that program for each round here: the first of them finds no caches warm, nor does ours."""


def compiled() -> bytes:
    """The program, for a guest that has nothing but a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "spawn.c", Path(folder) / "spawn"
        source.write_text(PROGRAM)
        subprocess.run(["gcc", "-static", "-Os", "-s", "-o", binary, source], check=True)
        return binary.read_bytes()


async def measure(rounds: int) -> list[Row]:
    """Rows for a container that stays, and for a new one each time."""
    async with (
        pykata.Sandbox(isolation="emulated") as sandbox,
        sandbox.container("builtin:busybox") as container,
    ):
        program = await anyio.to_thread.run_sync(compiled)
        await container.shell("cat > /spawn && chmod +x /spawn", input=program, check=True)
        in_guest: list[float] = []

        async def guest() -> float:
            done = await container.run(["/spawn", str(IN_GUEST), "/bin/true"], check=True)
            in_guest.extend(int(line) / 1e6 for line in done.stdout.split())
            return in_guest[-1]

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

        await interleaved(3, guest, kept, fresh, host)
        in_guest.clear()
        # Those in new containers by themselves: after each the guest makes the next one's container.
        _, in_kept, on_host = await interleaved(rounds, guest, kept, host)
        (in_fresh,) = await interleaved(rounds, fresh)
    return [
        row("exec in a container", "ms", in_kept, in_guest),
        row("run in a new container", "ms", in_fresh, in_guest),
        row("  fork, exec and wait in the guest", "ms", in_guest),
        row("  true on the host", "ms", on_host),
    ]


if __name__ == "__main__":
    main(measure, rounds=50, about=__doc__)
