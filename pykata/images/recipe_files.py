"""The files of a recipe as a tar: the same files always give the same bytes."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from attrs import evolve

from pykata.errors import ConfigError, ImageNotFoundError
from pykata.images.directory import write_entries
from pykata.images.entry import Entry, Kind
from pykata.images.ignore import Ignored
from pykata.images.layers import Output
from pykata.images.limits import DEFAULT_LIMITS
from pykata.images.recipe import FileContent, FilesStep
from pykata.images.stream import CHUNK
from pykata.images.tar_writer import END, header, padding


def write_files(step: FilesStep, dest: IO[bytes]) -> None:
    """Write them to ``dest``. Raises ConfigError for what can't be read."""
    out = Output(dest)
    for path, given in sorted(step.files.items()):
        if isinstance(given.content, Path) and given.content.is_dir():
            _write_directory(given.content, path.encode(), given, out, dest)
        else:
            _write_file(path, given, out)
    out.write(END)
    out.flush()


def _write_file(path: str, given: FileContent, out: Output) -> None:
    with _opened(given.content) as (size, mode, file):
        uid, gid = given.owner
        mode = mode if given.mode is None else given.mode
        out.write(header(Entry(path.encode(), Kind.FILE, mode, uid, gid, size=size, stored=size)))
        left = size
        while left:
            data = file.read(min(left, CHUNK))
            if not data:
                raise ConfigError(f"a file for {path} became shorter while it was read")
            out.write(data)
            left -= len(data)
        out.write(padding(size))


@contextmanager
def _opened(content: bytes | Path) -> Iterator[tuple[int, int, IO[bytes]]]:
    if isinstance(content, bytes):
        yield len(content), 0o644, io.BytesIO(content)
        return
    try:
        file = content.open("rb")
    except OSError as exc:
        raise ConfigError(f"can't read {content!s}: {exc.strerror}") from exc
    with file:
        found = os.fstat(file.fileno())
        yield found.st_size, stat.S_IMODE(found.st_mode), file


def _write_directory(source: Path, top: bytes, given: FileContent, out: Output, dest: IO[bytes]) -> None:
    """What is in a directory. It itself isn't written: it may be there already, with another mode or owner."""
    ignored = Ignored(given.exclude)
    uid, gid = given.owner

    def placed(entry: Entry) -> Entry | None:
        if not entry.path or ignored(os.fsdecode(entry.path)):
            return None
        path = top + b"/" + entry.path if top else entry.path
        return evolve(entry, path=path, uid=uid, gid=gid, mtime=0, nanoseconds=0)

    try:
        write_entries(source, DEFAULT_LIMITS, out, dest.flush, placed)
    except ImageNotFoundError as exc:
        raise ConfigError(f"there is no directory {source} any more") from exc
