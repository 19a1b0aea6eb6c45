"""What a network changes on the host and the kernel doesn't undo by itself: written down before it is done.

The record is a file in the sandbox's run directory, a line for each change. Who leaves in order undoes his changes
himself; after a crash ``pykata gc`` reads the record and does the same. To undo something that isn't there is no error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from pykata.errors import PykataError
from pykata.host import finish

log = logging.getLogger(__name__)

RECORD = "network.jsonl"
UNDO = {
    "redirection": "pykata.net.tcfilter:restore",
    "macvtap": "pykata.net.macvtap:restore",
    "pin": "pykata.net.netns:unpinned",
    "cni": "pykata.net.cni:deleted",
    "table": "pykata.net.guarding:without_table",
}
"""What undoes each kind of change: a coroutine function that takes what was written down."""


@asynccontextmanager
async def recorded(run_dir: Path, kind: str, **what: Any) -> AsyncIterator[None]:
    """Undo a change when the block is left, which makes it. ``what`` is all that undoing it takes, as JSON."""
    with (run_dir / RECORD).open("a") as record:
        record.write(json.dumps({"kind": kind, **what}) + "\n")
    try:
        yield
    finally:
        await finish(_undo(kind, what))


async def undo_all(run_dir: Path) -> None:
    """Undo what the network of a sandbox has left, whose process was killed. What can't be undone is logged."""
    try:
        lines = (run_dir / RECORD).read_text().splitlines()
    except OSError:
        return
    for line in reversed(lines):
        try:
            what = json.loads(line)
            kind = what.pop("kind")
        except (ValueError, KeyError):
            continue        # it was being written when the process was killed, so nothing was done yet
        try:
            await _undo(kind, what)
        except (PykataError, OSError) as error:
            log.warning("can't undo %s of %s: %s", kind, run_dir.name, error)


async def _undo(kind: str, what: dict[str, Any]) -> None:
    module, _, function = UNDO[kind].partition(":")
    await getattr(import_module(module), function)(**what)
