"""From an image's name to a root filesystem that the agent can mount."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from attrs import frozen

from pykata.guest import Bundle
from pykata.images import Pulling, resolve
from pykata.options import Options
from pykata.running import Running
from pykata.spec import Attachment, Disk, Image, PullPolicy


@frozen
class Prepared:
    """An image whose filesystem is plugged into the virtual machine; ``serials`` are its disks', by tag."""

    image: Image
    attachment: Attachment
    serials: Mapping[str, str]


@asynccontextmanager
async def prepared(
    running: Running, image: str | Image, pull: PullPolicy | None = None
) -> AsyncIterator[Prepared]:
    """Find the image, unless it was found; make it a disk, plug it in.

    Unplugged when left: whatever mounts it must be gone by then. ``pull`` None is as the sandbox has it.
    """
    if isinstance(image, str):
        image = await found(running.options, running.bundle, image, pull)
    await running.settled()
    running.check_files(image)
    await running.uses(image)
    async with plugged(running, image) as prepared:
        running.check()         # it may have been paused while this waited
        yield prepared


@asynccontextmanager
async def plugged(running: Running, image: Image) -> AsyncIterator[Prepared]:
    """The same of an image that was found."""
    async with AsyncExitStack() as stack:
        attachment = await stack.enter_async_context(running.options.fs.rootfs(image, running.run_dir))
        serials = {
            disk.tag: await stack.enter_async_context(running.plugged(disk))
            for disk in attachment.devices
            if isinstance(disk, Disk)
        }
        yield Prepared(image, attachment, serials)


async def found(options: Options, bundle: Bundle, reference: str, pull: PullPolicy | None = None) -> Image:
    """The image of this name, pulled if need be. Raises ImageError."""
    how = Pulling(pull or options.pull, options.registries, options.progress)
    return await resolve(reference, architecture=bundle.architecture, builtin=builtin_images(bundle), how=how)


def builtin_images(bundle: Bundle) -> Mapping[str, tuple[Path, dict[str, object]]]:
    """The images that came with the guest bundle: name -> disk and OCI config."""
    return {"busybox": (bundle.busybox, json.loads(bundle.busybox_config.read_bytes()))}
