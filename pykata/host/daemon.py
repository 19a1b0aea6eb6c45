"""Starting a program that outlives us: the one process that no block of code owns."""

from __future__ import annotations

import asyncio
import logging
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pykata.errors import HostError
from pykata.host.cleanup import finish
from pykata.host.tools import find_tool

log = logging.getLogger(__name__)


async def start_daemon(
    argv: Sequence[str | Path], *, stdin: int, output: int, pass_fds: Sequence[int], env: Mapping[str, str]
) -> None:
    """Start a program in a session of its own, as nobody's child; ``output`` is its stdout and stderr.

    It isn't told when we end, nor we when it does: give it a socket for that, among ``pass_fds``.
    """
    # setsid forks, so that init adopts the program: as our own child it would be a zombie after its end until we do.
    command = [str(find_tool("setsid", package="util-linux")), "--fork", *map(str, argv)]
    log.debug("start: %s", shlex.join(command))

    def start() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            command, stdin=stdin, stdout=output, stderr=output, pass_fds=pass_fds, env=env, check=False
        )

    try:
        done = await finish(asyncio.to_thread(start))
    except OSError as exc:
        raise HostError(f"can't run {command[0]}: {exc}") from exc
    if done.returncode:
        raise HostError(f"can't start {argv[0]}: setsid exited with code {done.returncode}")
