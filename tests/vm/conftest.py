"""What the tests of whole sandboxes share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext

import pytest

import pykata.boot
from pykata import Sandbox
from pykata.guest import Bundle
from tests.places import places as places

BUSYBOX = "builtin:busybox"


@pytest.fixture(scope="module")
async def sb(bundle: Bundle, anyio_backend: str) -> AsyncIterator[Sandbox]:
    """A sandbox that all tests of a file use, one after the other.

    Nothing goes on in it between them, so that what a test has left there is told from that.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYKATA_BUNDLE", str(bundle.path))
        patch.setattr(pykata.boot, "expecting", nullcontext)
        async with Sandbox(isolation="emulated", hostname="shared") as sandbox:
            yield sandbox
