"""Images that came with the guest bundle: a filesystem that is ready to be attached, and a config."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pykata.errors import ImageError, ImageNotFoundError
from pykata.images.config import parse_config
from pykata.images.document import Document
from pykata.images.reference import Reference
from pykata.images.store import open_file
from pykata.spec import Image

Builtin = Mapping[str, tuple[Path, Mapping[str, Any]]]
"""Name -> the disk (a squashfs) and the OCI config."""


def find_builtin(reference: Reference, architecture: str, builtin: Builtin) -> Image:
    name = reference.location
    if name not in builtin:
        known = ", ".join(sorted(builtin)) or "none"
        raise ImageNotFoundError(f"there is no builtin image {name!r}", hint=f"there is {known}")
    disk, config = builtin[name]
    try:
        with open_file(disk) as file:
            found = os.fstat(file.fileno())
        digest = _digest(disk, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    except OSError as exc:
        raise ImageError(f"can't read the disk of the builtin image {name!r}: {exc}") from exc
    return Image(
        reference=reference.text, digest=f"sha256:{digest}", architecture=architecture, disk=disk,
        config=parse_config(Document(dict(config), f"config of {name}")),
    )


@functools.lru_cache(maxsize=16)
def _digest(disk: Path, stamp: tuple[int, ...]) -> str:
    """Of a file that is known by its ``stamp``: to read it takes longer than all else between two commands."""
    with open_file(disk) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
