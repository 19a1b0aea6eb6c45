"""Changes to files of a container, as they happen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import PurePosixPath

from pykata.files.paths import text
from pykata.files.session import Session
from pykata.files.tool import Tool
from pykata.files.v1 import Event, EventKind, Request, Watch
from pykata.files.values import FileEvent, FileEventKind

KINDS: dict[int, FileEventKind] = {
    EventKind.CREATED: "created", EventKind.MODIFIED: "modified", EventKind.DELETED: "deleted",
    EventKind.MOVED: "moved", EventKind.OVERFLOW: "overflow",
}  # fmt: skip


class FileEvents:
    """An async iterator of :class:`FileEvent`, up to the end of what is watched. Made by ``files.watch(...)``."""

    def __init__(self, tool: Tool, top: PurePosixPath) -> None:
        self._tool = tool
        self._top = top

    def __aiter__(self) -> AsyncIterator[FileEvent]:
        return self

    async def __anext__(self) -> FileEvent:
        if await self._tool.over():
            raise StopAsyncIteration
        event = (await self._tool.answer(None)).event
        if event is None or event.kind not in KINDS:
            self._tool.broken("sent another answer than what happened to a file")
        return FileEvent(KINDS[event.kind], self._path(event.path), self._target(event), event.directory)

    def _target(self, event: Event) -> PurePosixPath | None:
        return self._path(event.target) if event.kind == EventKind.MOVED else None

    def _path(self, relative: bytes) -> PurePosixPath:
        parts = relative.split(b"/") if relative else []
        if len(relative) > 65536 or b"\0" in relative or any(part in (b"", b".", b"..") for part in parts):
            self._tool.broken("told of a file by a name that none can have")
        return self._top / text(relative)


@asynccontextmanager
async def watched(session: Session, path: bytes, *, recursive: bool) -> AsyncIterator[FileEvents]:
    """Watch while the block runs."""
    async with session.own() as tool:
        await tool.begin(Request(watch=Watch(path=path, recursive=recursive)), path)
        await tool.done()
        tool.idle = False
        yield FileEvents(tool, PurePosixPath(text(path)))
