"""An error as one readable line on stderr; with ``-v`` the whole story."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress

from pykata import PykataError
from pykata_cli import exits
from pykata_cli.printing import say

SECTIONS = {"console": "the end of the guest's console", "output": "the end of its output"}


def complain(error: BaseException, *, verbose: bool) -> int:
    """Say what went wrong; returns the exit code."""
    cause = first_cause(error)
    if isinstance(cause, BrokenPipeError):
        return exits.SIGNAL + exits.SIGPIPE     # who read what we print has left; any other program would end, too
    if verbose:
        with suppress(OSError):     # as with what is said
            traceback.print_exception(cause)
            for line in _story(cause):
                print(line, file=sys.stderr)
    say(one_line(cause))
    return exits.PYKATA


def first_cause(error: BaseException) -> BaseException:
    """Of several errors at once (the two readers of a process that lost its machine) the first of ours."""
    leaves = list(_leaves(error))
    return next((leaf for leaf in leaves if isinstance(leaf, PykataError)), leaves[0])


def one_line(error: BaseException) -> str:
    """The message and the hint, without the control characters that a guest may have put into them."""
    if isinstance(error, PykataError):
        text = str(error)
    else:
        text = f"this is a bug: {type(error).__name__}: {error} (-v shows where)"
    return " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _story(error: BaseException) -> Iterator[str]:
    for attribute, title in SECTIONS.items():
        if text := getattr(error, attribute, ""):
            yield f"--- {title}"
            yield from (f"    {line}" for line in str(text).splitlines())
