"""Answers of any length, taken into memory up to a limit."""

from __future__ import annotations

import errno
from pathlib import PurePosixPath

from pykata.files.decode import file_entry
from pykata.files.failures import error
from pykata.files.handle import ContainerFile
from pykata.files.paths import text
from pykata.files.session import Session
from pykata.files.tool import Tool
from pykata.files.v1 import List, Request
from pykata.files.values import FileEntry


async def all_of(file: ContainerFile, path: bytes, limit: int, exact: int | None) -> bytes:
    """A file's content, of which no more is read than is told by :func:`bounded`."""
    data = bytearray()
    async for piece in file:
        data += piece
        if len(data) > limit or (exact is not None and len(data) >= exact):
            break
    return bounded(bytes(data), path, limit, exact)


def bounded(data: bytes, path: bytes, limit: int, exact: int | None) -> bytes:
    """Content: its first ``exact`` bytes if there is such a number, else all. More than ``limit`` are an error."""
    data = data if exact is None else data[:exact]
    if len(data) > limit:
        raise error(
            errno.EFBIG, "read into memory", path,
            hint=f"it has more than {limit} bytes: raise limit=, or read it as a stream with open()",
        )  # fmt: skip
    return data


async def entries(session: Session, path: bytes, limit: int) -> list[FileEntry]:
    """What is in a directory."""
    directory = PurePosixPath(text(path))
    found: list[FileEntry] = []
    async with session.several(Request(list=List(path=path)), path) as tool:
        while not await _batch(tool, directory, found):
            if len(found) > limit:
                break
        else:
            tool.idle = True
        if len(found) > limit:
            raise error(
                errno.EFBIG, "list", path, hint=f"it has more than {limit} entries: raise limit="
            )  # fmt: skip
    found.sort(key=lambda entry: entry.name)
    return found


async def _batch(tool: Tool, directory: PurePosixPath, found: list[FileEntry]) -> bool:
    """Take the next batch; whether it was the last."""
    answer = (await tool.answer()).entries
    if answer is None or not (answer.entries or answer.last):
        tool.broken("sent another answer than entries of a directory")
    found.extend(file_entry(directory, each) for each in answer.entries)
    return answer.last
