"""What the tests of whole sandboxes share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest

import pykata.boot
from pykata import Sandbox
from pykata.guest import Bundle
from tests.places import places as places

BUSYBOX = "builtin:busybox"


@asynccontextmanager
async def shared(bundle: Bundle, **options: Any) -> AsyncIterator[Sandbox]:
    """A sandbox for several tests. Nothing goes on in it between them, so that what one has left is told from that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYKATA_BUNDLE", str(bundle.path))
        patch.setattr(pykata.boot, "expecting", nullcontext)
        async with Sandbox(isolation="emulated", **options) as sandbox:
            yield sandbox


@pytest.fixture(scope="module")
async def sb(bundle: Bundle, anyio_backend: str) -> AsyncIterator[Sandbox]:
    """A sandbox that all tests of a file use, one after the other."""
    async with shared(bundle, hostname="shared") as sandbox:
        yield sandbox
