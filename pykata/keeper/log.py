"""What the main command writes, in a file of bounded size: a line of JSON for each piece.

``{"t": 1700000000.5, "s": "stdout", "d": "text"}``, with ``"b"`` (base64) in place of ``"d"`` for what isn't UTF-8. At
half the limit the file becomes ``log.1``, in place of the one before, and a new one begins.
"""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio

from pykata.spec import StreamName

LIMIT = 16 * 1024 * 1024
"""Bytes that the log of a sandbox may take on disk, the part before included."""


class Log:
    """The log of one sandbox, being written."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self._path = path
        self._half = limit // 2
        self._file = self._open()
        self._size = 0
        self._count = 0
        self._written = anyio.Event()
        self.lost = 0
        """Pieces that could not be written: the disk was full, say."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def write(self, stream: StreamName, piece: bytes) -> None:
        """Append a piece. A file that can't be written is no reason to stop the command: the piece is lost."""
        line = _line(stream, piece)
        try:
            if self._size and self._size + len(line) > self._half:
                self._rotate()
            if os.write(self._file, line) != len(line):
                raise OSError("only a part was written")
        except OSError:
            self.lost += 1
            os.ftruncate(self._file, self._size)        # half a line would spoil the next one
        else:
            self._size += len(line)
        self._count += 1
        self._written.set()
        self._written = anyio.Event()

    async def beyond(self, count: int) -> int:
        """Wait until more than ``count`` pieces have been written; returns how many."""
        while self._count <= count:
            await self._written.wait()
        return self._count

    def _rotate(self) -> None:
        self._path.rename(self._path.with_name(f"{self._path.name}.1"))
        fresh = self._open()
        os.close(self._file)
        self._file, self._size = fresh, 0

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _line(stream: StreamName, piece: bytes) -> bytes:
    entry: dict[str, object] = {"t": round(time.time(), 3), "s": stream}
    try:
        entry["d"] = piece.decode()
    except UnicodeDecodeError:
        entry["b"] = base64.b64encode(piece).decode()
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
