"""Whether a file is still the one that was read: what is known of it without reading it again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

Stamp = tuple[int, int, int, int, int]


def stamp(found: os.stat_result) -> Stamp:
    """What tells a file from each other, and from what it was before somebody wrote to it.

    Who writes to it can't set its ctime back (statx(2)).
    """
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
