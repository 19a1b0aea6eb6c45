"""No network: the guest has its loopback interface and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

from attrs import frozen

from pykata.net.base import NetworkStrategy, Wanted
from pykata.spec import Attachment


@frozen
class NoNetwork(NetworkStrategy):
    """The default: untrusted code has no business on the network."""

    name: ClassVar[str] = "none"

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        yield Attachment()
