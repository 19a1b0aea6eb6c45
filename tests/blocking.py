"""Finds calls that block the event loop."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import pytest

BLOCKING = {
    (owner, name): getattr(owner, name)
    for owner, name in (
        (time, "sleep"), (socket, "getaddrinfo"), (socket, "gethostbyname"), (os, "system"),
        (subprocess.Popen, "wait"), (subprocess.Popen, "communicate"),
    )
}
"""Calls that have no business in the thread of a running loop."""


class Blocking(logging.Handler):
    """While it is entered, such calls in the running loop are found; with ``slow``, steps of more seconds as well."""

    def __init__(self, slow: float | None = None) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []
        self.slow = slow
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        for (owner, name), original in BLOCKING.items():
            self._patch.setattr(owner, name, self._noticed(name, original))
        if self.slow is not None:
            loop = asyncio.get_running_loop()
            loop.set_debug(True)
            loop.slow_callback_duration = self.slow
            logging.getLogger("asyncio").addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.undo()
        logging.getLogger("asyncio").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """asyncio's debug mode has measured a step that took too long."""
        if record.getMessage().startswith("Executing "):
            self.found.append(f"slow: {record.getMessage()}")

    def _noticed(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def noticed(*args: Any, **kwargs: Any) -> Any:
            # sleep(0) yields the GIL, no more.
            if asyncio._get_running_loop() is not None and args != (0,):
                caller = sys._getframe(1)
                self.found.append(f"blocking: {name} in {caller.f_code.co_filename}:{caller.f_lineno}")
            return original(*args, **kwargs)

        return noticed
