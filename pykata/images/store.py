"""Where the files of an image lie: in a directory, or in an archive."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO, Protocol

from attrs import frozen

from pykata.errors import ImageCorruptError, ImageError, ImageNotFoundError
from pykata.images.document import MAX_DOCUMENT


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
