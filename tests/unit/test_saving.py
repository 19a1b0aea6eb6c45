"""Saving that is cancelled, and the machine that is started ahead of a fork's first child: nothing is booted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from pykata import Sandbox, ahead, saving
from pykata.ahead import Ahead
from pykata.errors import HostError
from pykata.host import held, memory_file
from pykata.hypervisors.qemu import state
from pykata.hypervisors.qemu.vm import QemuVM
from pykata.spares import Spare
from pykata.spec import SavedVM
from pykata.testing import FakeHypervisor

SIZE = 1 << 20


class Held:
    """A step in a thread that goes on until it is let go."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.let_go = threading.Event()
        self.is_over = False
        self._loop = asyncio.get_running_loop()

    def __call__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self.begun.set)
        self.let_go.wait()
        self.is_over = True

    async def outlasts_its_cancellation(self, work: Callable[[], Any]) -> None:
        """Who is cancelled meanwhile ends after it, as cancelled."""
        task = asyncio.ensure_future(work())
        try:
            await self.begun.wait()
            task.cancel()
            for _ in range(20):
                await checkpoint()
            assert not task.done()
        finally:
            self.let_go.set()
            await asyncio.wait([task])
        assert task.cancelled()
        assert self.is_over


def qemu() -> QemuVM:
    """One that stands still, without a process."""

    @asynccontextmanager
    async def still() -> AsyncIterator[dict[int, object]]:
        yield {}

    vm = object.__new__(QemuVM)
    slots = SimpleNamespace(still=still)
    vars(vm).update(pid=0, _memory=SIZE, _started_from=None, _paused=True, _qmp=None, _slots=slots)
    return vm


@pytest.mark.parametrize("step", ["prepare", "finish"])
async def test_memory_stays_open_while_a_thread_copies_it(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def devices(_: object) -> bytes:
        return b""

    copying = Held()
    monkeypatch.setattr(state, "devices", devices)
    monkeypatch.setattr(state.Copy, "prepare", lambda _: None)
    monkeypatch.setattr(state.Copy, step, copying)

    async def save() -> None:
        async with qemu().saved():
            pytest.fail("it was cancelled")

    await copying.outlasts_its_cancellation(save)


async def test_no_snapshot_is_written_after_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def as_it_is(*_: object) -> AsyncIterator[None]:
        yield

    writing = Held()
    monkeypatch.setattr(saving, "as_it_is", as_it_is)
    monkeypatch.setattr(saving, "_write", writing)
    running: Any = None
    await writing.outlasts_its_cancellation(lambda: saving.snapshot(running, tmp_path / "snapshot"))


@contextmanager
def nothing_yet() -> Iterator[SavedVM]:
    with memory_file(SIZE) as memory, held(memory) as file:
        yield SavedVM(file, b"")


async def test_a_machine_that_takes_nothing_is_given_up() -> None:
    bundle: Any = object()
    machine: Any = object()
    ended: list[str] = []
    with anyio.fail_after(300), nothing_yet() as coming:
        async with Ahead(Sandbox(FakeHypervisor(), boot_timeout=0.1).options, bundle) as one:
            stack = AsyncExitStack()
            stack.callback(ended.append, "it")
            one._spare = Spare(machine, stack)
            assert await one.complete(SavedVM(coming.file, bytes(16 << 20))) is None
            assert not ended
    assert ended == ["it"]


async def test_a_machine_ahead_has_the_bundle_of_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle: Any = object()
    given: list[object] = []

    @asynccontextmanager
    async def admitted_now(_: int) -> AsyncIterator[bool]:
        yield True

    async def attached(*_: object, bundle: object = None, **__: object) -> None:
        given.append(bundle)
        raise HostError("that is enough")

    monkeypatch.setattr(ahead, "admitted_now", admitted_now)
    monkeypatch.setattr(ahead, "attached", attached)
    with nothing_yet() as coming:
        async with Ahead(Sandbox(FakeHypervisor()).options, bundle) as one:
            async with one.starting(coming):
                await one._settled.wait()
            assert await one.complete(coming) is None
    assert given == [bundle]
