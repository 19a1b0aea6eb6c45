"""Where the files of an image lie: in a directory, or in an archive."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from attrs import evolve, frozen

from pykata.errors import ImageCorruptError, ImageError, ImageNotFoundError, ImageUnsupportedError
from pykata.images.document import MAX_DOCUMENT
from pykata.images.limits import Limits
from pykata.images.reference import Reference


class Store(Protocol):
    """Files by name. ``open`` raises FileNotFoundError, and ImageError for what isn't a file."""

    @property
    def path(self) -> Path: ...

    def open(self, name: str) -> IO[bytes]: ...


def has(store: Store, name: str) -> bool:
    try:
        store.open(name).close()
    except OSError:
        return False
    return True


def read_small(store: Store, name: str) -> bytes:
    """A file that is a document; what is beyond the limit of documents isn't read. Raises FileNotFoundError."""
    with store.open(name) as file:
        try:
            return file.read(MAX_DOCUMENT + 1)
        except OSError as exc:
            raise ImageError(f"can't read {name} of {store.path}: {exc}") from exc


def open_store(path: Path) -> Store:
    """The directory or archive at ``path``."""
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return Folder(path)
        # Not loaded for a directory, which needs no reading of tars until its layers are read.
        from pykata.images.archive import open_archive

        with open_file(path) as file:
            return open_archive(path, file)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageNotFoundError(f"there is no {path}") from None
    except OSError as exc:
        raise ImageError(f"can't read {path}: {exc}") from exc


def in_place(reference: Reference, limits: Limits, poll: Callable[[], None]) -> Reference:
    """The same archive where it can be read in any order: a pipe and a compressed one are written to the cache."""
    path = reference.path
    try:
        found = path.stat()
        mode = found.st_mode
        if stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and not _is_compressed(path)):
            return reference
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            return reference                    # what it is, who opens it says
        from pykata.images.spool import find_spooled, read_file, spooled

        identity = (
            str(path.absolute()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns,
        )  # fmt: skip
        key = hashlib.sha256(repr(identity).encode()).hexdigest() if stat.S_ISREG(mode) else ""
        archive = find_spooled(key) if key else None
        archive = archive or spooled(read_file(path, poll), str(path), limits, key)
        return evolve(reference, location=str(archive))
    except (FileNotFoundError, NotADirectoryError):
        return reference
    except OSError as exc:
        raise ImageError(f"can't read {path}: {exc.strerror}") from exc


def _is_compressed(path: Path) -> bool:
    from pykata.images.compression import compression_of
    from pykata.images.stream import StreamError

    with open_file(path) as file:
        try:
            return compression_of(file.read(10)) != "plain"
        except StreamError as exc:
            raise ImageUnsupportedError(f"{path}: {exc}", hint="uncompress it first") from exc


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file: anything else might block for ever, such as a fifo."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageCorruptError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


@frozen
class Folder:
    """A directory. Its symlinks are followed, for some share blobs by them; names don't lead out of it."""

    path: Path

    def open(self, name: str) -> IO[bytes]:
        if ".." in name.split("/") or name.startswith("/"):
            raise FileNotFoundError(f"{name} is not below {self.path}")
        return open_file(self.path / name)
