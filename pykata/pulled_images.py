"""The images on this machine that came from registries: pulling, listing and removing them."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio.to_thread
from attrs import frozen

from pykata import host
from pykata.errors import ImageError, ImageInUseError, ImageNotFoundError, ImageReferenceError
from pykata.fs.base import SharedFs
from pykata.fs.block import kept_disks
from pykata.options import check_pull
from pykata.spec import Image, Progress, PullPolicy, Registries
from pykata.strategies import strategy


@frozen
class StoredImage:
    """An image that was pulled.

    ``size`` is what it takes on disk: its layers as they came, and what was made of them; layers that images share
    count for each. ``used`` is when it was used last, in seconds since 1970.
    """

    name: str
    digest: str
    architecture: str
    size: int
    used: float


async def pull_image(
    name: str,
    *,
    pull: PullPolicy = "always",
    registries: Registries | None = None,
    progress: Progress | None = None,
    architecture: str | None = None,
    fs: SharedFs | str = "block",
) -> Image:
    """Get an image from its registry and make it ready for sandboxes.

    ::

        await pull_image("python:3.12-slim", progress=print)

    ``architecture`` is the guest's (``x86_64``, ``aarch64``), by default this machine's, ``fs`` how sandboxes get its
    files. Raises :class:`ImageError`, :class:`HostError` and :class:`ConfigError`.
    """
    from pykata.images import Pulling, resolve

    how = Pulling(check_pull(pull), registries, progress)
    shared = strategy(SharedFs, "pykata.filesystems", fs)  # type: ignore[type-abstract]
    image = await resolve(name, architecture=architecture or os.uname().machine, how=how)
    async with shared.rootfs(image, host.cache_dir()):
        return image


async def list_images() -> list[StoredImage]:
    """The images that were pulled, those first that were used last."""
    found = await anyio.to_thread.run_sync(_list)
    return sorted(found, key=lambda image: image.used, reverse=True)


async def remove_image(name: str) -> int:
    """Remove an image that was pulled, for all architectures; returns the bytes that this gave back.

    Layers of other images stay. Raises :class:`ImageNotFoundError`, and :class:`ImageInUseError` if a sandbox has it.
    """
    return await anyio.to_thread.run_sync(partial(_remove, name))


def _taken() -> int:
    """The bytes of all images; what they share counts once."""
    from pykata.images.depot import find_depot

    depot, files = find_depot(), set[Path]()
    for record, _ in depot.records():
        files.update(map(depot.blob, depot.digests(record)))
        with suppress(ImageError):
            files.update(kept_disks(depot.describe(record).digest))
    return sum(map(_size, files))


def _list() -> list[StoredImage]:
    from pykata.images.depot import find_depot

    depot, found = find_depot(), []
    for record, used in depot.records():
        with suppress(ImageError):              # its manifest was removed: all that is left is its name
            described = depot.describe(record)
            files = [*map(depot.blob, depot.digests(record)), *kept_disks(described.digest)]
            found.append(StoredImage(record.name, record.top, record.architecture, sum(map(_size, files)), used))
    return found


def _remove(name: str) -> int:
    from pykata.images.depot import find_depot
    from pykata.images.reference import parse

    parsed, depot = parse(name).name, find_depot()
    if parsed is None:
        raise ImageReferenceError(f"{name!r} is no image of a registry", reference=name, hint="others aren't kept")
    records = [record for record, _ in depot.records() if record.name == str(parsed)]
    if not records:
        raise ImageNotFoundError(f"there is no image {parsed} here", reference=name, hint="see pykata images")
    before = _taken()
    for record in records:
        for disk in _own_disks(record.stem):
            if not host.remove_unused(disk):
                raise ImageInUseError(f"{name} is in use", reference=name, hint="a sandbox has it; end that first")
        depot.remove(record)
    return before - _taken()


def _own_disks(stem: str) -> list[Path]:
    """What was made of an image; nothing if another name means the same filesystem."""
    from pykata.images.depot import find_depot

    depot, digests = find_depot(), dict[str, str]()
    for record, _ in depot.records():
        with suppress(ImageError):
            digests[record.stem] = depot.describe(record).digest
    own = digests.pop(stem, "")
    return kept_disks(own) if own and own not in digests.values() else []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
