"""A disk slot that somebody has as long as nobody needs it: when it is over, and when it is never given back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from pykata.errors import HostError
from pykata.host import memory_file
from pykata.hypervisors.qemu import slots
from pykata.hypervisors.qemu.slots import Slots
from pykata.spec import Disk, LentSlot

GUARD = 60.0        # seconds; only a hang takes that long


class Monitor:
    """Does at once what it is asked for, or, when it is held, what it was asked for as soon as it is let go."""

    def __init__(self) -> None:
        self.asked = 0
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def execute(self, command: str, arguments: object = None, *, fd: int | None = None) -> object:
        self.asked += 1
        await self.goes_on.wait()
        return {}


def slots_of(monitor: Any, count: int) -> Slots:
    return Slots(monitor, count, {})


@asynccontextmanager
async def lent(found: Slots) -> AsyncIterator[LentSlot]:
    with memory_file(4096) as memory:
        async with found.lend(memory, lambda: None) as slot:
            assert slot is not None
            yield slot


async def test_nothing_is_still_before_a_slot_is_empty_again() -> None:
    monitor, entered = Monitor(), SimpleNamespace(still=False)
    found = slots_of(monitor, 1)

    async def be_still() -> None:
        async with found.still():
            entered.still = True

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
            await stack.enter_async_context(lent(found))
            asked = monitor.asked
            monitor.goes_on.clear()
            tasks.start_soon(stack.aclose)
            while monitor.asked == asked:
                await checkpoint()
            tasks.start_soon(be_still)
            for _ in range(20):
                await checkpoint()
            assert found._loan is not None
            assert not entered.still
            monitor.goes_on.set()
        assert entered.still
        assert found._free == [0]


async def test_a_cancelled_borrower_leaves_no_loan() -> None:
    found = slots_of(Monitor(), 1)
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
        async with lent(found):
            scope.cancel()
    assert found._loan is None
    assert found._free == [0]


async def test_who_waits_in_vain_learns_of_lost_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "PATIENCE", 0.01)
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    found = slots_of(Monitor(), 1)
    before = os.listdir("/proc/self/fd")
    async with lent(found) as slot:
        slot.is_lost = True
    with pytest.raises(HostError, match="1 of them lost"):
        async with found.plug(Disk("image", image)):
            pytest.fail("no slot is left")
    assert len(os.listdir("/proc/self/fd")) == len(before)
