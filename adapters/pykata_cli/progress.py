"""Shows how far a build is: one line that changes on a terminal, and now and then a line elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from attrs import define, field

from pykata_cli.printing import tell

Report = Callable[[str, int, int, str], None]
"""Called with a step, how much of it is done, of how much (0: unknown), and what is being done."""

CLEAR = "\r\x1b[K"


@contextmanager
def progress(out: TextIO) -> Iterator[Report]:
    """What shows progress on ``out``."""
    if not out.isatty():
        yield Lines(out)
        return
    line = ChangingLine(out)
    try:
        yield line
    finally:
        tell(out, CLEAR)


@define
class ChangingLine:
    """All steps on one line, which is written over and over: ``kernel 46%  agent 80%  CC mm/slub.o``."""

    out: TextIO
    _steps: dict[str, str] = field(factory=dict)

    def __call__(self, step: str, done: int, total: int, text: str) -> None:
        self._steps[step] = percent(done, total)
        line = "  ".join(f"{name} {how_far}".strip() for name, how_far in self._steps.items())
        width = shutil.get_terminal_size().columns - 1
        tell(self.out, CLEAR + f"{line}  {text}"[:width])


@define
class Lines:
    """A line at every tenth of a step."""

    out: TextIO
    _shown: dict[str, tuple[int, str]] = field(factory=dict)
    _began: float = field(factory=time.monotonic)

    def __call__(self, step: str, done: int, total: int, text: str) -> None:
        # A step of unknown length has nothing but its text to tell.
        now = (done * 10 // total, "") if total else (0, text)
        if self._shown.get(step) == now:
            return
        self._shown[step] = now
        seconds = time.monotonic() - self._began
        tell(self.out, f"{seconds:5.0f} s  {step} {percent(done, total)}  {text}\n")


def percent(done: int, total: int) -> str:
    """``46%``, or nothing when the whole isn't known."""
    return f"{done * 100 // total}%" if total else ""
