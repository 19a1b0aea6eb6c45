"""What every way of sharing files with the guest offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import ClassVar

from pykata.spec import Attachment, Image


class SharedFs(ABC):
    """A way to bring an image's filesystem into the guest: a frozen value with its options."""

    name: ClassVar[str] = ""
    """As in :attr:`~pykata.spec.Features.filesystems`."""
    shared: ClassVar[bool] = False
    """Whether the machine has a device for it, served by a process of the host: such a machine can't be saved."""

    @asynccontextmanager
    async def attach(self, run_dir: Path) -> AsyncIterator[Attachment]:
        """What the machine must have from its start. Raises :class:`~pykata.errors.HostError`."""
        yield Attachment()

    @asynccontextmanager
    async def made(self, image: Image) -> AsyncIterator[None]:
        """Have on this host what machines will need of ``image``, before one is started; it stays while the block runs.

        A filesystem that makes nothing of an image has nothing to do. Raises :class:`~pykata.errors.ImageError` and
        :class:`~pykata.errors.HostError`.
        """
        yield

    @abstractmethod
    def rootfs(self, image: Image, run_dir: Path) -> AbstractAsyncContextManager[Attachment]:
        """Make ``image`` attachable to the machine that has this run directory.

        The attachment's mounts are the read-only layers, topmost first. Raises :class:`~pykata.errors.ImageError` and
        :class:`~pykata.errors.HostError`.
        """
