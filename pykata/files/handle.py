"""Files of a container as streams, for those that are larger than memory or have no end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from attrs import frozen

from pykata.buffers import bytes_of
from pykata.errors import ConfigError
from pykata.files import checks, v1
from pykata.files.decode import file_stat
from pykata.files.session import Session
from pykata.files.tool import Tool
from pykata.files.values import FileStat

Mode = Literal["rb", "wb", "ab", "xb", "r+b"]


@frozen(kw_only=True)
class Opening:
    """How a file is opened."""

    mode: str
    offset: int = 0
    size: int | None = None
    permissions: int | None = None
    parents: bool = False
    atomic: bool = True

    def __attrs_post_init__(self) -> None:
        if self.mode not in ("rb", "wb", "ab", "xb", "r+b"):
            raise ConfigError(f"mode={self.mode!r} is unknown", hint='"rb", "wb", "ab", "xb" or "r+b"')
        checks.number("offset", self.offset)
        if self.size is not None:
            checks.number("size", self.size)
        if self.permissions is not None:
            checks.mode("permissions", self.permissions)
        if self.offset and self.mode not in ("rb", "r+b"):
            raise ConfigError(f"offset={self.offset} means nothing in mode {self.mode!r}", hint='"rb" or "r+b"')
        if self.size is not None and self.mode != "rb":
            raise ConfigError(f"size={self.size} means nothing in mode {self.mode!r}")

    def request(self, path: bytes, data: bytes | None = None) -> v1.Request:
        """What asks for it: with all of the data, or for a stream."""
        if self.mode == "rb":
            return v1.Request(read=v1.Read(path=path, offset=self.offset, size=self.size or 0, bulk=data is None))
        how = {
            "wb": v1.WriteHow.REPLACE if self.atomic else v1.WriteHow.OVERWRITE, "ab": v1.WriteHow.APPEND,
            "xb": v1.WriteHow.CREATE, "r+b": v1.WriteHow.AT,
        }[self.mode]  # fmt: skip
        return v1.Request(write=v1.Write(
            path=path, data=data or b"", how=how, offset=self.offset, parents=self.parents,
            set_mode=self.permissions is not None, mode=(self.permissions or 0) & checks.PERMISSIONS, bulk=data is None,
        ))  # fmt: skip


class ContainerFile:
    """An open file of a container, read or written from one end to the other. Made by ``container.files.open(...)``.

    An async iterator of its bytes, in pieces as they come.
    """

    def __init__(self, tool: Tool, stat: FileStat, mode: str) -> None:
        self._tool = tool
        self._mode = mode
        self._rest = b""
        self._ended = False
        self.stat = stat
        """The file as it was opened; a new one, until it is complete, as nobody else sees it."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._check(self._mode == "rb", "read")
        return self

    async def __anext__(self) -> bytes:
        if not (piece := await self._next()):
            raise StopAsyncIteration
        return piece

    async def read(self, size: int = -1) -> bytes:
        """The next ``size`` bytes, fewer only at the end of the file; all that is left by default."""
        self._check(self._mode == "rb", "read")
        checks.number("size", size, least=-1)
        pieces, have = [], 0
        try:
            while (size < 0 or have < size) and (piece := await self._next()):
                pieces.append(piece)
                have += len(piece)
        except BaseException:
            self._rest = b"".join(pieces) + self._rest      # a cancelled read has taken nothing
            raise
        data = b"".join(pieces)
        if 0 <= size < have:
            data, self._rest = data[:size], data[size:]
        return data

    async def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write ``data``, all of it; waits while the container's side is slower. Returns its length."""
        self._check(self._mode != "rb", "written")
        view = bytes_of(data)
        await self._tool.send(view)
        return len(view)

    async def complete(self) -> None:
        """Everything is written: put it in its place."""
        if self._mode != "rb":
            await self._tool.complete()

    async def _next(self) -> bytes:
        if self._rest:
            piece, self._rest = self._rest, b""
            return piece
        if self._ended:
            return b""
        piece = await self._tool.data()
        self._ended = not piece
        return piece

    def _check(self, possible: bool, what: str) -> None:
        if not possible:
            raise ConfigError(f"a file opened with mode {self._mode!r} can't be {what}")


@asynccontextmanager
async def opened(session: Session, path: bytes, how: Opening) -> AsyncIterator[ContainerFile]:
    """Open a file; what was written is in its place when the block ends without an error."""
    async with session.own() as tool:
        await tool.begin(how.request(path), path)
        file = ContainerFile(tool, file_stat(await tool.attributes()), how.mode)
        yield file
        await file.complete()
