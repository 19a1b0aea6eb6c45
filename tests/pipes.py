"""What is written to a pipe, which may be more than it takes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def read_meanwhile(work: Callable[[int], T]) -> tuple[T, bytes]:
    """What ``work`` returns, and what it writes to a pipe until it closes it; another thread reads that."""
    reader, writer = os.pipe()
    parts: list[bytes] = []

    def read() -> None:
        with os.fdopen(reader, "rb") as pipe:
            parts.append(pipe.read())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        done = work(writer)
    finally:
        thread.join()
    return done, parts[0]
