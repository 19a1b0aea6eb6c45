"""Images that came with the guest bundle: a filesystem that is ready to be attached, and a config."""

from __future__ import annotations

import hashlib
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
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as exc:
        raise ImageError(f"can't read the disk of the builtin image {name!r}: {exc}") from exc
    return Image(
        reference=reference.text, digest=f"sha256:{digest}", architecture=architecture, disk=disk,
        config=parse_config(Document(dict(config), f"config of {name}")),
    )
