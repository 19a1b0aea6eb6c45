"""Which bundles have been read and found whole: reading one takes 0.1 s, which a start hasn't got.

The notes are kept in the user's cache, one a bundle, so that each is good for all programs of the user.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from pykata.errors import HostError
from pykata.host import cache_dir, stamp


def checked_before(bundle: Path, files: Iterable[Path]) -> bool:
    """Whether these files of it are those that were found whole."""
    try:
        return noted(_note(bundle), _state(files))
    except HostError:       # there is no cache
        return False


def remember(bundle: Path, files: Iterable[Path]) -> None:
    """They have been found whole. Where that can't be noted, they are read again the next time."""
    noted.cache_clear()
    try:
        note = _note(bundle)
        note.parent.mkdir(exist_ok=True)
        new = note.with_suffix(f".{os.getpid()}")
        new.write_text(_state(files))
        new.rename(note)
    except (OSError, HostError):
        return


@lru_cache(maxsize=4)
def noted(note: Path, state: str) -> bool:
    """What the note says; it isn't read for each start."""
    try:
        return note.read_text() == state
    except (OSError, ValueError):
        return False


def _note(bundle: Path) -> Path:
    return cache_dir() / "whole" / hashlib.sha256(os.fsencode(bundle.resolve())).hexdigest()[:32]


def _state(files: Iterable[Path]) -> str:
    return "\n".join(" ".join(map(str, stamp(file.stat()))) for file in files)
