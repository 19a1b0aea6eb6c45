"""The layers of what a recipe begins with."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import IO, cast

import anyio.to_thread

from pykata import host
from pykata.errors import ConfigError
from pykata.images.config import go_architecture
from pykata.images.depot import Depot, Record, explained
from pykata.images.pack import Built, WriteTar, copy_file, pack, unless_left
from pykata.images.reference import parse
from pykata.spec import Image

OCI = "application/vnd.oci.image.layer.v1.tar"
COMPRESSIONS = ("gzip", "zstd")


async def base_layers(
    reference: str, base: Image, depot: Depot, once: Callable[[Callable[[], Awaitable[Built]]], Awaitable[Built]]
) -> list[Built]:
    """Those of an image of a registry as they are, downloaded if need be; of any other one layer, made ``once``."""
    name = parse(reference).name
    record = None if name is None else depot.find(str(name), go_architecture(base.architecture))
    if record is not None and base.write_tar is not None:
        if not await anyio.to_thread.run_sync(_is_here, depot, record):
            await unless_left(partial(_download, base.write_tar))
        return await anyio.to_thread.run_sync(_as_they_are, depot, record)
    if base.write_tar is not None:
        return [await once(partial(pack, depot, base.write_tar))]
    if base.disk_type != "squashfs":
        raise ConfigError(f"base={reference!r} is a disk of {base.disk_type}, which has no layers",
                          hint="of disks only a squashfs can be built on")
    return [await once(partial(_of_disk, cast(Path, base.disk), depot))]


def _is_here(depot: Depot, record: Record) -> bool:
    return all(depot.has(layer.digest, layer.size) for layer, _ in depot.describe(record).layers)


class _Discarding:
    """Takes what is written, and is left when nobody waits any more."""

    def __init__(self, poll: Callable[[], None]) -> None:
        self.flush = poll

    def write(self, data: bytes | memoryview) -> int:
        self.flush()
        return len(data)


def _download(write_tar: WriteTar, poll: Callable[[], None]) -> None:
    write_tar(cast(IO[bytes], _Discarding(poll)))


def _as_they_are(depot: Depot, record: Record) -> list[Built]:
    return [Built(layer.digest, layer.size, diff_id, _oci_type(layer.media_type))
            for layer, diff_id in depot.describe(record).layers]


def _oci_type(media_type: str) -> str:
    """Docker's media types in OCI's words, which our manifest has."""
    used = next((one for one in COMPRESSIONS if media_type.endswith(one)), "")
    return f"{OCI}+{used}" if used else OCI


async def _of_disk(disk: Path, depot: Depot) -> Built:
    tool = host.find_tool("sqfs2tar", package="squashfs-tools-ng")
    with explained(depot.path), tempfile.TemporaryDirectory(prefix=host.BUILDING, dir=depot.path) as work:
        tar = Path(work, "disk.tar")
        # Into a file: what a tool writes to its stdout is held in memory.
        script = 'exec "$0" --no-skip --root-becomes . "$1" > "$2"'
        await host.run_tool(["/bin/sh", "-c", script, tool, disk, tar])
        return await pack(depot, partial(copy_file, tar))
