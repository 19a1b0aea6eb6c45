"""An image in two parts: its tree with all but the content of files, as a tar, and the content as plain files.

The tar is for overlayfs: each file that has content says by two attributes that the content isn't here, and where it
is in a layer of data (linux/Documentation/filesystems/overlayfs.rst, "Data-only lower layers"). Files of content have
numbers for names: no name, owner, mode or attribute of an image ever meets the host's filesystem.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import IO, cast

from attrs import define, evolve

from pykata.errors import ImageCorruptError
from pykata.images.entry import BadEntryError, Entry, Kind
from pykata.images.layers import Output
from pykata.images.stream import Reader, StreamError, read_chunks, write_all
from pykata.images.tar_reader import TarReader
from pykata.images.tar_writer import END, header

WriteTar = Callable[[IO[bytes]], None]

# linux/fs/overlayfs/overlayfs.h, struct ovl_metacopy: version, length, flags, digest algorithm (none).
_METACOPY = (b"trusted.overlay.metacopy", b"\0\4\0\0")
_REDIRECT = b"trusted.overlay.redirect"
_EACH = 1024        # files in a directory of content


def without_content(entry: Entry, place: bytes) -> Entry:
    """The entry of a file whose content is at ``place``, an absolute path in the layer of data."""
    # A hole of the whole size: stat(2) asks the layer of the tree.
    attributes = (*entry.xattrs, _METACOPY, (_REDIRECT, place))
    return evolve(entry, extents=(), stored=0, xattrs=attributes)


def write_apart(write_tar: WriteTar, dest: IO[bytes], content: Path | None) -> None:
    """Write the tree of what ``write_tar`` writes to ``dest``, and the content of its files below ``content``.

    ``dest`` is as for ``write_tar``. Raises what that raises, and OSError.
    """
    assert content is not None
    out, store = Output(dest), _Store(content)
    with _piped(write_tar, dest) as archive:
        reader = TarReader(Reader(read_chunks(archive)))
        for entry in reader:
            if entry.kind is Kind.FILE and entry.stored:
                entry = without_content(entry, store.put(entry, reader.data()))
            out.write(header(entry))
    out.write(END)
    out.flush()


@define
class _Store:
    """Files by number, in directories of a limited size."""

    root: Path
    count: int = 0
    directory: str = ""

    def put(self, entry: Entry, data: Iterator[memoryview]) -> bytes:
        """Write the content of a file; returns its place."""
        group, name = divmod(self.count, _EACH)
        if name == 0:
            self.directory = f"{self.root}/{group:x}"
            os.mkdir(self.directory)
            # The VMM may run as another user, whatever our umask is.
            Path(self.directory).chmod(0o755)
        self.count += 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(f"{self.directory}/{name:x}", flags, 0o600)
        try:
            _fill(descriptor, entry, data)
            os.fchmod(descriptor, 0o444)
        finally:
            os.close(descriptor)
        return b"/%x/%x" % (group, name)


def _fill(descriptor: int, entry: Entry, data: Iterator[memoryview]) -> None:
    if entry.extents is None:
        for piece in data:
            write_all(descriptor, piece)
        return
    os.truncate(descriptor, entry.size)
    extents = iter(entry.extents)
    left = 0
    for piece in data:
        while piece:
            if not left:
                offset, left = next(extents)
                os.lseek(descriptor, offset, os.SEEK_SET)
            part, piece = piece[:left], piece[left:]
            write_all(descriptor, part)
            left -= len(part)


@contextmanager
def _piped(write_tar: WriteTar, dest: IO[bytes]) -> Iterator[IO[bytes]]:
    """What ``write_tar`` writes in a thread, as a file to read from. The thread has ended when the block is left."""
    read_end, write_end = os.pipe()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            write_tar(cast(IO[bytes], _Pipe(write_end, dest)))
        except BaseException as exc:    # raised by who reads
            failures.append(exc)
        finally:
            os.close(write_end)

    thread = Thread(target=run, name="pykata-image", daemon=True)
    thread.start()
    try:
        with os.fdopen(read_end, "rb", buffering=0) as archive:
            yield archive
    except (StreamError, BadEntryError) as exc:
        _ended(thread, failures)        # what broke off is better told by who broke it off
        raise ImageCorruptError(f"its tree can't be read: {exc}") from exc
    except BaseException:
        thread.join()                   # its pipe is closed
        raise
    _ended(thread, failures)


def _ended(thread: Thread, failures: list[BaseException]) -> None:
    thread.join()
    for failure in failures:
        if not isinstance(failure, BrokenPipeError):
            raise failure


@define
class _Pipe:
    """One end of a pipe, as the file that ``write_tar`` writes to; it ends when ``dest`` does."""

    descriptor: int
    dest: IO[bytes]

    def write(self, data: bytes | memoryview) -> int:
        self.dest.flush()
        write_all(self.descriptor, memoryview(data))
        return len(data)

    def flush(self) -> None:
        self.dest.flush()
