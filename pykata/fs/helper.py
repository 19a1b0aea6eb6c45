"""The programs that share directories: how they are launched."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from pykata.errors import NotPermittedError
from pykata.spec import Shared

ENTER = Path(__file__).with_name("enter.py")
NO_NAMESPACE = "no user namespace can be made"      # what it says where it may make none


def not_permitted(why: str) -> NotPermittedError:
    """For who may not make the namespaces that a server of directories runs in."""
    return NotPermittedError(
        why, hint="Bind(via='9p'), DiskImage and fs='block' need none; root can allow them: user.max_user_namespaces, "
                  "kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns, see sysctl(8)",
    )  # fmt: skip


def entered(
    root: Path, shares: Sequence[Shared], shelf: socket.socket | None, program: Sequence[str] = ()
) -> list[str]:
    """The argv of ``program`` in namespaces in which ``shares`` are side by side below ``root``: see enter.py."""
    words = [str(root), "-" if shelf is None else str(shelf.fileno()), str(len(shares))]
    for share in shares:
        kind = "dir" if share.path.is_dir() else "file"
        words += [share.name, os.fsdecode(share.path), "ro" if share.readonly else "rw", kind]
    return [sys.executable, "-I", "-S", str(ENTER), *words, *program]
