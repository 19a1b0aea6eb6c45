"""The programs that share directories: how they are launched."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from pykata.spec import Shared

ENTER = Path(__file__).with_name("enter.py")


def entered(
    root: Path, shares: Sequence[Shared], shelf: socket.socket | None, program: Sequence[str] = ()
) -> list[str]:
    """The argv of ``program`` in namespaces in which ``shares`` are side by side below ``root``: see enter.py."""
    plan = {
        "root": str(root),
        "shares": [
            (share.name, os.fsdecode(share.path), "ro" if share.readonly else "rw",
             "dir" if share.path.is_dir() else "file")
            for share in shares
        ],
        "shelf": None if shelf is None else shelf.fileno(),
    }  # fmt: skip
    return [sys.executable, "-I", "-S", str(ENTER), json.dumps(plan), *program]
