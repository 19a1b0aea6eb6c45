"""Images that are known to be needed before a machine is started: found, and made ready, first.

So one that is missing or damaged is an error before anything runs. It takes no longer than it would take afterwards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from attrs import define

from pykata.command import Command
from pykata.guest import find_bundle
from pykata.isolation import check_here
from pykata.options import Options
from pykata.rootfs import found
from pykata.spec import Image, PullPolicy


@define(eq=False)
class Foreseen:
    """A command in an image, asked for while its sandbox wasn't entered yet. ``image`` is there once that is."""

    reference: str
    pull: PullPolicy
    what: Command
    image: Image | None = None

    @asynccontextmanager
    async def ready(self, options: Options) -> AsyncIterator[None]:
        """Find the image and make it ready; it stays so while the block runs."""
        async with ready_image(options, self.reference, self.pull, self.what) as self.image:
            yield


@asynccontextmanager
async def ready_image(
    options: Options, reference: str, pull: PullPolicy, what: Command | None = None
) -> AsyncIterator[Image]:
    """An image, pulled if need be, with what a machine will need of it; that stays while the block runs.

    Raises what starting on this machine would raise at once, ImageError, HostError, and ConfigError for a command that
    neither ``what`` nor the image has.
    """
    check_here(options)         # before anything is pulled
    image = await found(options, find_bundle(), reference, pull)
    if what is not None:
        what.argv(image.config)
    async with options.fs.made(image):
        yield image
