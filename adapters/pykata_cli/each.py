"""Doing the same to several things by their names: one that fails doesn't keep the others from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import pykata
from pykata_cli import exits
from pykata_cli.complaint import one_line
from pykata_cli.printing import say, show


async def each(names: Sequence[str], act: Callable[[pykata.Detached], Awaitable[object]]) -> int:
    """As :func:`each_name`, to detached sandboxes."""

    async def find_and_act(name: str) -> None:
        await act(pykata.find_detached(name))

    return await each_name(names, find_and_act, exits.PYKATA)


async def each_name(names: Sequence[str], act: Callable[[str], Awaitable[object]], failed: int) -> int:
    """Do it, and print the names for which it went well; returns the exit code, ``failed`` if for one it didn't."""
    code = 0
    for name in names:
        try:
            await act(name)
        except pykata.PykataError as error:
            say(one_line(error))
            code = failed
        else:
            show(name)
    return code
