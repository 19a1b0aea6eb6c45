"""Reading the log of a detached sandbox, which its keeper may be writing and rotating (:mod:`pykata.keeper.log`)."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from attrs import frozen

from pykata.detached.directory import Directory
from pykata.errors import DetachedEndedError, DetachedLostError, PykataError
from pykata.spec import StreamName


@frozen
class LogPiece:
    """What the main command of a detached sandbox wrote at once. ``time`` is seconds since 1970."""

    time: float
    stream: StreamName
    data: bytes


async def read(directory: Directory, *, follow: bool) -> AsyncGenerator[LogPiece]:
    """What was written, and with ``follow`` what is being written, up to the end of the sandbox."""
    with Reader(directory.log) as reader:
        if follow:
            async with aclosing(_followed(directory, reader)) as pieces:
                async for piece in pieces:
                    yield piece
        for piece in reader.pieces():
            yield piece


async def _followed(directory: Directory, reader: Reader) -> AsyncGenerator[LogPiece]:
    from pykata.detached.link import connected

    async with AsyncExitStack() as stack:
        try:
            keeper = await stack.enter_async_context(connected(directory))
        except (DetachedEndedError, DetachedLostError):
            return
        with suppress(PykataError):         # it has ended in this moment, which is no error of a log
            await keeper.call("watch")
        while not keeper.is_gone:
            grown = keeper.grown
            for piece in reader.pieces():
                yield piece
            if not keeper.is_gone:
                await grown.wait()


class Reader:
    """The log's files, in their order, as they come and go."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._old = path.with_name(f"{path.name}.1")
        self._rest = b""
        # The new file first: if it becomes the old one meanwhile, they are the same, and none is read twice.
        new = _open(self._path)
        old = _open(self._old)
        self._files = [file for file in (old, new) if file is not None]
        if old is not None and new is not None and _same(old, new):
            old.close()
            self._files = [new]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def pieces(self) -> Iterator[LogPiece]:
        """What there is to read now."""
        while self._files:
            for line in self._lines(self._files[0]):
                yield _piece(line)
            if len(self._files) == 1 and not self._look_further():
                return
            for line in self._lines(self._files[0]):        # what came before it was put away
                yield _piece(line)
            self._files.pop(0).close()
            self._rest = b""

    def _lines(self, file: IO[bytes]) -> Iterator[bytes]:
        while data := file.read(256 * 1024):
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from lines

    def _look_further(self) -> bool:
        """Have files been begun after the one that is read?"""
        current = self._files[0]
        new = _open(self._path)
        if new is None or _same(new, current):
            if new is not None:
                new.close()
            return False
        old = _open(self._old)
        if old is not None and (_same(old, current) or _same(old, new)):
            old.close()
            old = None
        self._files += [file for file in (old, new) if file is not None]
        return True


def _open(path: Path) -> IO[bytes] | None:
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        return None


def _same(one: IO[bytes], other: IO[bytes]) -> bool:
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


def _piece(line: bytes) -> LogPiece:
    entry = json.loads(line)
    data = base64.b64decode(entry["b"]) if "b" in entry else entry["d"].encode()
    return LogPiece(entry["t"], entry["s"], data)
