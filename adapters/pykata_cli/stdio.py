"""Our own stdin, stdout and stderr, as bytes, without buffers and without blocking the event loop."""

from __future__ import annotations

import os
import select
from collections.abc import AsyncIterator

import anyio

import pykata

STDIN, STDOUT, STDERR = 0, 1, 2
NAMES = {STDOUT: "stdout", STDERR: "stderr"}

# pipe(7): a write of at most PIPE_BUF bytes to a pipe that poll(2) calls writable doesn't block.
_PIECE = select.PIPE_BUF
_READ = 64 * 1024


async def read(fd: int) -> AsyncIterator[bytes]:
    """What can be read, as it comes, up to the end."""
    while True:
        # epoll refuses regular files, which are always ready; poll(2) takes them.
        if not _ready(fd, select.POLLIN):
            await anyio.wait_readable(fd)
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            continue
        except OSError:
            return              # EIO: the terminal is gone, or we are a background job
        if not data:
            return
        yield data


async def write(fd: int, data: bytes) -> None:
    """Write everything. Raises BrokenPipeError when nobody reads it, and HostError when it can't be written."""
    rest = memoryview(data)
    while rest:
        if not _ready(fd, select.POLLOUT):
            await anyio.wait_writable(fd)
        try:
            rest = rest[os.write(fd, rest[:_PIECE]):]
        except BrokenPipeError:
            raise
        except BlockingIOError:
            # Someone made the pipe non-blocking, and it was emptier when poll(2) looked.
            await anyio.lowlevel.checkpoint()
        except OSError as exc:
            raise pykata.HostError(f"can't write to {NAMES.get(fd, fd)}: {exc.strerror}") from exc


def _ready(fd: int, events: int) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(0))
