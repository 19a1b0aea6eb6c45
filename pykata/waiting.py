"""The container that waits for the next run of an image that is run again and again in a sandbox.

Each run has a container of its own, which is made for it and gone with it, and with the last container of an image the
guest forgets what it has read of it. So when two runs in a row were of the same image, another container of it is made
once nobody waits for that any more: a process in it waits for the next command.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
from attrs import define, field

from pykata.concurrency import alongside
from pykata.errors import PykataError
from pykata.host import finish
from pykata.making import fresh_container
from pykata.rootfs import plugged
from pykata.running import Running
from pykata.spec import Image

log = logging.getLogger(__name__)

IN_A_ROW = 2
"""So many runs of an image, and one more is expected."""


@define(eq=False)
class Waiting:
    """Which image is run again and again, and its container."""

    running: Running
    _image: Image | None = None
    _times: int = 0
    _asked: anyio.Event = field(factory=anyio.Event)
    _held: AsyncExitStack = field(factory=AsyncExitStack)

    def ran(self, image: Image) -> None:
        """A container that was made for one command of this image is gone."""
        self._times = self._times + 1 if self._is_expected(image) else 1
        self._image = image
        if self._times >= IN_A_ROW:
            self._asked.set()

    async def makes_room(self, image: Image) -> None:
        """Another image is about to be used: it may need the disk slot."""
        if self._image is not None and not self._is_expected(image):
            self._times, self._image = 0, None
            async with self.running.making:
                await self._held.aclose()

    def _is_expected(self, image: Image) -> bool:
        return self._image is not None and (image.digest, image.config) == (self._image.digest, self._image.config)

    async def serve(self) -> None:
        """Make what is expected, until the sandbox is left."""
        while True:
            await self._asked.wait()
            self._asked = anyio.Event()
            if (image := self._image) is not None:
                try:
                    await self._make(image)
                except PykataError as error:
                    log.debug("no container of %s waits for its next run: %s", image.reference, error)

    async def _make(self, image: Image) -> None:
        async with AsyncExitStack() as stack:
            # Its slot may have to be waited for; nobody shall wait for us meanwhile.
            rootfs = await stack.enter_async_context(plugged(self.running, image))
            async with self.running.making:
                if not self._is_expected(image) or self.running.fresh(image) is not None:
                    return
                await self._held.aclose()
                await stack.enter_async_context(fresh_container(self.running, rootfs))
                self._held = stack.pop_all()


@asynccontextmanager
async def expecting(running: Running) -> AsyncIterator[None]:
    """Expect more of what is run, as long as the block runs."""
    running.waiting = waiting = Waiting(running)
    try:
        async with alongside(waiting.serve()):
            yield
    finally:
        await finish(waiting._held.aclose())
