"""What this user's named volumes are, and how much they take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import anyio.to_thread
from attrs import frozen

from pykata.host import DEVNULL, PIPE, TOOL_ENV, find_tool, spawn
from pykata.volumes.marks import is_marked
from pykata.volumes.named import named_paths


@frozen
class StoredVolume:
    """A volume that has a name.

    ``size`` is what it takes on disk, in bytes, ``limit`` the size with which it was made, if it has one. ``changed``
    is when something in it was last written to, made or removed, in seconds since 1970, and ``in_use`` whether a
    sandbox of this machine has it now.
    """

    name: str
    size: int
    limit: int | None
    changed: float
    in_use: bool


async def describe_volumes() -> list[StoredVolume]:
    """The named volumes that this user has, by name. All of their files are looked at. Raises ToolMissingError."""
    paths = await anyio.to_thread.run_sync(named_paths)
    if not paths:
        return []
    taken = await _taken(paths)
    return await anyio.to_thread.run_sync(_described, paths, taken)


def _described(paths: Iterable[Path], taken: dict[Path, tuple[int, float]]) -> list[StoredVolume]:
    found = []
    for path in paths:
        try:
            limit = path.stat().st_size if path.is_file() else None
        except FileNotFoundError:           # removed meanwhile
            continue
        if path in taken:
            found.append(StoredVolume(path.name, taken[path][0], limit, taken[path][1], is_marked(path)))
    return found


async def _taken(paths: Iterable[Path]) -> dict[Path, tuple[int, float]]:
    """Bytes on disk, and when they changed, as du(1) finds them: no depth and no symlink of a guest's misleads it."""
    # The time of the inode: the others can be set.
    argv: list[str | Path] = [
        find_tool("du", package="coreutils"), "--summarize", "--block-size=1", "--one-file-system", "--null",
        "--time=ctime", "--time-style=+%s", "--", *paths,
    ]  # fmt: skip
    async with spawn(argv, stdout=PIPE, stderr=DEVNULL, env=TOOL_ENV) as process:
        assert process.stdout is not None
        said = b"".join([chunk async for chunk in process.stdout])
        await process.wait()                # its code says only that something was removed while it was looking
    lines = [line.split("\t", 2) for line in said.decode(errors="surrogateescape").split("\0") if line]
    return {Path(path): (int(size), float(changed)) for size, changed, path in lines}
