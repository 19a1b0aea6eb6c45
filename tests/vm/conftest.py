"""What the tests of whole sandboxes share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pykata import Sandbox
from pykata.guest import Bundle
from tests.places import places as places

BUSYBOX = "builtin:busybox"


@pytest.fixture(scope="module")
async def sb(bundle: Bundle, anyio_backend: str) -> AsyncIterator[Sandbox]:
    """A sandbox that all tests of a file use, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYKATA_BUNDLE", str(bundle.path))
        async with Sandbox(isolation="emulated", hostname="shared") as sandbox:
            yield sandbox
