"""What every network offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pykata.spec import Attachment


class Network(ABC):
    """A way to connect the guest: a frozen value with its options."""

    @abstractmethod
    def attach(self, run_dir: Path) -> AbstractAsyncContextManager[Attachment]:
        """Make the host's side; yields the devices, interfaces and name servers for the guest.

        Raises :class:`~pykata.errors.HostError`.
        """
