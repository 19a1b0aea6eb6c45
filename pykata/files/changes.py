"""What a container has changed against its image."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pykata.agent.v1 import ProcessTool
from pykata.errors import AgentProtocolError
from pykata.files.failures import error
from pykata.files.paths import text
from pykata.files.tool import tool
from pykata.files.transfer import Place, place_for, received
from pykata.files.v1 import Change, ChangeKind, Changes, Request
from pykata.files.values import FileChange, FileChangeKind
from pykata.running import Running

KINDS: dict[int, FileChangeKind] = {
    ChangeKind.ADDED: "added", ChangeKind.MODIFIED: "modified", ChangeKind.DELETED: "deleted",
}  # fmt: skip
ROOT = b"/"


async def changes(running: Running, container: str, limit: int) -> list[FileChange]:
    """All changes, sorted by path."""
    found: list[FileChange] = []
    async with tool(running, container, "", ProcessTool.CHANGES) as process:
        await process.begin(Request(changes=Changes()), ROOT)
        while (answer := await process.answer()).done is None:
            if answer.change is None:
                process.broken("sent another answer than a change")
            found.append(_decoded(answer.change))
            if len(found) > limit:
                raise error(errno.EFBIG, "list the changes of", ROOT, hint=f"more than {limit}: raise limit=")
    return sorted(found, key=lambda change: change.path)


def _decoded(change: Change) -> FileChange:
    if change.kind not in KINDS or not change.path.startswith(b"/") or b"\0" in change.path:
        raise AgentProtocolError("the guest told of a change that can't be")
    return FileChange(KINDS[change.kind], PurePosixPath(text(change.path)))


async def export(running: Running, container: str, target: Path, max_size: int) -> str:
    """Write the changes as a layer of an image, a tar; returns its digest. The file is there when it is complete."""
    async with place_for(target) as place, tool(
        running, container, "", ProcessTool.CHANGES, much=True
    ) as process:
        await process.begin(Request(changes=Changes(bulk=True)), ROOT)
        await process.done()
        process.idle = False
        return await received(process, lambda reader: _store(reader.chunks(), place, max_size), target)


def _store(pieces: Iterator[bytes], place: Place, max_size: int) -> str:
    digest = hashlib.sha256()
    with place.create() as out:
        for piece in _bounded(pieces, max_size):
            digest.update(piece)
            out.write(piece)
    return f"sha256:{digest.hexdigest()}"


def _bounded(pieces: Iterator[bytes], max_size: int) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > max_size:
            raise error(errno.EFBIG, "export the changes of", ROOT, hint=f"more than {max_size} bytes: raise max_size=")
        yield piece
