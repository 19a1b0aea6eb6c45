"""A root filesystem in a tar, plain or compressed: not a layer of an image, but all there is."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from typing import IO

from pykata.errors import ImageError, ImageNotFoundError
from pykata.images.layer import Layer, write_merged
from pykata.images.limits import Limits
from pykata.images.reference import Reference
from pykata.images.store import open_file
from pykata.spec import Image, ImageConfig

DEFAULT_CONFIG = ImageConfig(
    cmd=("/bin/sh",), env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
)
"""How a filesystem without a config is run."""


def find_tarball(reference: Reference, architecture: str, limits: Limits) -> Image:
    """Find a tar. It is taken for the same as long as it is the same file, unchanged; what is in it isn't read yet."""
    path = reference.path.absolute()
    with _open(reference) as file:
        found = os.fstat(file.fileno())
    identity = (str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    layer = Layer(str(path), partial(_open, reference), whiteouts=False)
    return Image(
        reference=reference.text, digest=f"sha256:{hashlib.sha256(repr(identity).encode()).hexdigest()}",
        config=DEFAULT_CONFIG, architecture=architecture, write_tar=partial(write_merged, [layer], limits),
    )


def _open(reference: Reference) -> IO[bytes]:
    try:
        return open_file(reference.path)
    except FileNotFoundError:
        raise ImageNotFoundError(f"there is no file {reference.path}") from None
    except OSError as exc:
        raise ImageError(f"can't read {reference.path}: {exc}") from exc
