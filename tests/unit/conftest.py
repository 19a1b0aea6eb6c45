"""Fixtures of these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pykata.testing import fake_bundle
from tests.places import places as places


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[None]:
    """A guest bundle for machines that are none."""
    with fake_bundle(tmp_path):
        yield
