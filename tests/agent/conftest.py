"""Fixtures of these tests."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest

MUCH = 24 * 1024 * 1024
"""Bytes of memory that no agent may cost the host."""


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Fails a test in which an agent cost more."""
    tracemalloc.start(1)
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MUCH
