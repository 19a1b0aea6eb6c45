"""Volumes as a virtual machine gets them, and where they are in its guest."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from attrs import evolve, frozen

from pykata.fs.block import Block
from pykata.fs.ninep import directory
from pykata.fs.virtiofs import served
from pykata.spec import VOLUMES, Attachment, Disk, Image, Mount, Shared
from pykata.volumes.disk import disk
from pykata.volumes.kinds import CACHES, Bind, DiskImage, FsspecVolume, ImageVolume, Tmpfs
from pykata.volumes.marks import marked
from pykata.volumes.named import is_named
from pykata.volumes.places import Checked

Find = Callable[[str], Awaitable[Image]]


@frozen
class Place:
    """A volume in a container: where the agent has it, and where it shall be."""

    source: str
    destination: str
    readonly: bool


def places(volumes: Mapping[str, Checked]) -> list[Place]:
    """Where each volume is in the guest, and where it belongs in a container. The same in each process."""
    out = []
    for number, (place, volume) in enumerate(volumes.items()):
        if isinstance(volume, Bind):
            source = f"9p{number}" if volume.via == "9p" else f"{_tag(volume)}/{number}"
            out.append(Place(f"{VOLUMES}/{source}", place, volume.readonly))
        elif isinstance(volume, DiskImage):
            out.append(Place(f"{VOLUMES}/disk{number}", place, volume.readonly))
        elif isinstance(volume, FsspecVolume):
            out.append(Place(f"{VOLUMES}/fsspec{number}", place, volume.readonly))
        elif isinstance(volume, ImageVolume):
            out.append(Place(f"{VOLUMES}/image{number}", place, readonly=True))
        else:
            out.append(Place(f"{VOLUMES}/tmpfs{number}", place, readonly=False))
    return out


@asynccontextmanager
async def attached(volumes: Mapping[str, Checked], run_dir: Path, find: Find) -> AsyncIterator[Attachment]:
    """All volumes, ready for a virtual machine. ``find`` finds an image. Raises HostError, ImageError."""
    attachment = Attachment()
    for number, volume in enumerate(volumes.values()):
        if isinstance(volume, Tmpfs):
            attachment += Attachment(mounts=(_tmpfs(number, volume),))
        elif isinstance(volume, Bind) and volume.via == "9p":
            attachment += directory(f"9p{number}", volume.path, readonly=volume.readonly, cache=volume.cache,
                                    security=volume.security)
    async with AsyncExitStack() as stack:
        for number, volume in enumerate(volumes.values()):
            if isinstance(volume, DiskImage):
                attachment += await stack.enter_async_context(disk(f"disk{number}", volume))
            elif isinstance(volume, ImageVolume):
                found = await find(volume.image)
                made = await stack.enter_async_context(Block().rootfs(found, run_dir))
                attachment += _as_volume(made, f"image{number}")
            if isinstance(volume, Bind | DiskImage) and is_named(volume.path):
                stack.enter_context(marked(volume.path))
        for cache in CACHES:
            shared = tuple(
                Shared(str(number), volume.path, volume.readonly) for number, volume in enumerate(volumes.values())
                if isinstance(volume, Bind) and volume.via == "virtiofs" and volume.cache == cache
            )  # fmt: skip
            if shared:
                attachment += await stack.enter_async_context(served(f"fs-{cache}", shared, cache, run_dir))
        yield attachment


def _as_volume(rootfs: Attachment, tag: str) -> Attachment:
    """The disk of a root filesystem as a volume."""
    (device,), (mount,) = rootfs.devices, rootfs.mounts
    assert isinstance(device, Disk)
    options = (*mount.options, "nosuid", "nodev")
    return Attachment((evolve(device, tag=tag),), (Mount(tag, mount.type, f"{VOLUMES}/{tag}", options),))


def _tag(volume: Bind) -> str:
    return f"fs-{volume.cache}"


def _tmpfs(number: int, volume: Tmpfs) -> Mount:
    options = (f"size={volume.size}", f"nr_inodes={volume.files}", "mode=1777", "nosuid", "nodev")
    return Mount("tmpfs", "tmpfs", f"{VOLUMES}/tmpfs{number}", options)
