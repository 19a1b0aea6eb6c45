"""Our own terminal, for a command that has one: raw while it runs, and as it was afterwards, however it ends."""

from __future__ import annotations

import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import anyio

import pykata
from pykata_cli import stdio


def size() -> pykata.Terminal:
    """The size of our terminal, or what terminals have when nobody says, if there is none."""
    for fd in (stdio.STDOUT, stdio.STDIN, stdio.STDERR):
        with suppress(OSError):
            columns, rows = os.get_terminal_size(fd)
            if rows and columns:
                return pykata.Terminal(rows=rows, cols=columns)
    return pykata.Terminal()


async def follow_size(process: pykata.Process) -> None:
    """Give the command's terminal the size of ours, now and whenever it changes."""
    with anyio.open_signal_receiver(signal.SIGWINCH) as signals, suppress(pykata.PykataError):
        await _resize(process)              # it may have changed since the command was started
        async for _ in signals:
            await _resize(process)          # whoever reads the output hears of a failure, too, and says it


async def _resize(process: pykata.Process) -> None:
    now = size()
    await process.resize(now.rows, now.cols)


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """Let every key through to who reads ``fd``, also Ctrl-C, and leave what is written as it is; then no more.

    Does nothing if that is no terminal.
    """
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        with _in_the_background():
            tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        # A terminal that has gone away needs nothing.
        with _in_the_background(), suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def _in_the_background() -> Iterator[None]:
    """Whoever changes the terminal without owning it is stopped by SIGTTOU (tcsetattr(3)), unless that is blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
