"""``python -m pykata.keeper DIRECTORY LEASH LOCK LISTENER``, with the request as a pickle on stdin: only for pykata."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import anyio

from pykata.detached.directory import Claim, Directory
from pykata.detached.welcome import Request, from_descriptor
from pykata.detached.wire import Wire
from pykata.keeper.keep import keep


def main(argv: list[str]) -> None:
    """Keep the sandbox that is described on stdin."""
    leash, lock, listener = map(int, argv[1:])
    for descriptor in (leash, lock, listener):
        os.set_inheritable(descriptor, False)
    claim = Claim(Directory(Path(argv[0])), lock, socket.socket(fileno=listener))
    request = from_descriptor(0, Request)
    # The request holds what is in the environment of the sandbox; nobody else shall read it from our stdin.
    os.dup2(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), 0)
    anyio.run(_keep, request, claim, leash)


async def _keep(request: Request, claim: Claim, leash: int) -> None:
    await keep(request, claim, Wire(socket.socket(fileno=leash)))


if __name__ == "__main__":
    main(sys.argv[1:])
