"""Doing the same to several sandboxes: one that fails doesn't keep the others from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import pykata
from pykata_cli import exits
from pykata_cli.complaint import one_line
from pykata_cli.printing import say, show


async def each(names: Sequence[str], act: Callable[[pykata.Detached], Awaitable[object]]) -> int:
    """Do it, and print the names for which it went well; returns the exit code."""
    code = 0
    for name in names:
        try:
            await act(pykata.find_detached(name))
        except pykata.PykataError as error:
            say(one_line(error))
            code = exits.PYKATA
        else:
            show(name)
    return code
