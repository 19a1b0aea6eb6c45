"""What every way of sharing files with the guest offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pykata.spec import Attachment, Image


class SharedFs(ABC):
    """A way to bring an image's filesystem into the guest: a frozen value with its options."""

    @abstractmethod
    def rootfs(self, image: Image, run_dir: Path) -> AbstractAsyncContextManager[Attachment]:
        """Make ``image`` attachable. The attachment's mounts are the read-only layers, topmost first.

        Raises :class:`~pykata.errors.ImageError` and :class:`~pykata.errors.HostError`.
        """
