"""Programs whose memory is made of small pages alone."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SET, _GET = 41, 42         # PR_SET_THP_DISABLE, PR_GET_THP_DISABLE: prctl(2)
_libc = ctypes.CDLL(None)
_turn = threading.Lock()


@contextmanager
def small_pages(wanted: bool) -> Iterator[None]:
    """What is spawned in the block gets no huge pages, whatever it asks for (mm/transhuge.rst).

    A huge page is there as a whole as soon as one byte of it is, so a program that asks for them takes up to 2 MiB more
    for each stretch of memory. A child inherits the setting with our memory, in which a vfork leaves it until it
    executes a program. What else of ours gets its pages in that millisecond gets small ones.
    """
    if not wanted:
        yield
        return
    with _turn:
        before = _libc.prctl(_GET, 0, 0, 0, 0)
        _libc.prctl(_SET, 1, 0, 0, 0)       # a kernel without huge pages refuses, and has none to give
        try:
            yield
        finally:
            if before == 0:
                _libc.prctl(_SET, 0, 0, 0, 0)
