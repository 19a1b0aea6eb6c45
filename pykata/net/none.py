"""No network: the guest has its loopback interface and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from attrs import frozen

from pykata.net.base import Network
from pykata.spec import Attachment


@frozen
class NoNetwork(Network):
    """The default: untrusted code has no business on the network."""

    @asynccontextmanager
    async def attach(self, run_dir: Path) -> AsyncIterator[Attachment]:
        yield Attachment()
