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

from pykata import Sandbox, ahead, saving, spares
from pykata.admission import RESTORED
from pykata.ahead import Ahead, NextFork, Waiting
from pykata.concurrency import alongside
from pykata.errors import HostError, VMError
from pykata.host import held, memory_file
from pykata.hypervisors.qemu import state
from pykata.hypervisors.qemu.vm import QemuVM
from pykata.spares import Spare
from pykata.spec import MIB, Disk, SavedVM
from pykata.testing import FakeHypervisor
from tests.settling import settled

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
    slots = SimpleNamespace(still=still, now=dict)
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
            async with one.starting(coming):
                one.complete(SavedVM(coming.file, bytes(16 << 20)))
                await one._settled.wait()
            assert one.take() is None
            assert not ended
    assert ended == ["it"]


async def test_a_machine_that_has_other_disks_is_not_taken() -> None:
    bundle: Any = object()
    machine: Any = object()
    ended: list[str] = []
    with nothing_yet() as coming:
        async with Ahead(Sandbox(FakeHypervisor()).options, bundle) as one:
            stack = AsyncExitStack()
            stack.callback(ended.append, "it")
            one._spare = Spare(machine, stack)
            async with one.starting(coming):
                one.complete(SavedVM(coming.file, b"", {0: Disk("image", Path("/image"))}))
                await one._settled.wait()
            assert one.take() is None
    assert ended == ["it"]


class Next(NextFork):
    """Its machines are of nothing; ``log`` says which came and went."""

    def __init__(self, started_from: int = 0) -> None:
        vm: Any = SimpleNamespace(started_from=started_from)
        nothing: Any = None
        super().__init__(vm, Sandbox(FakeHypervisor()).options, nothing)
        self.log: list[str] = []
        self.coming: Any = SimpleNamespace(is_current=True)

    async def _started(self) -> Waiting:
        number = sum(line.startswith("came") for line in self.log)
        self.log.append(f"came {number}")
        stack = AsyncExitStack()
        stack.callback(self.log.append, f"went {number}")
        vm = SimpleNamespace(has_ended=False, end=lambda why: self.log.append(f"ended {number}"))
        machine: Any = SimpleNamespace(vm=vm, agent=None)
        nothing: Any = None
        return Waiting(machine, stack, self.coming, nothing)


async def test_a_machine_waits_for_the_next_fork_when_one_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def admitted_now(_: int) -> AsyncIterator[bool]:
        yield True

    monkeypatch.setattr(spares, "admitted_now", admitted_now)
    with anyio.fail_after(300):
        following = Next()
        async with alongside(following.fill()):
            await following.filled()
            assert following.take() is None
            following.want()
            await following.filled()
            first = following.take()
            assert first is not None
            assert first.is_good
            await following.filled()        # no other comes before it is wanted
            assert following.log == ["came 0"]
            following.want()
            await following.filled()
            assert following.give_up()      # somebody needs its memory
            assert not following.give_up()
            assert following.take() is None
            following.want()
            await following.filled()
        await following.drain()
        await first.stack.aclose()
    assert following.log == ["came 0", "came 1", "ended 1", "went 1", "came 2", "went 2", "went 0"]


@pytest.mark.parametrize("reason", ["it has ended", "it has other disks"])
async def test_a_machine_that_is_no_good_is_removed_by_the_fork_that_finds_it(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def admitted_now(_: int) -> AsyncIterator[bool]:
        yield True

    monkeypatch.setattr(spares, "admitted_now", admitted_now)
    gone = anyio.Event()
    with anyio.fail_after(300):
        following = Next()
        async with alongside(following.fill()):
            following.want()
            await following.filled()
            (waiting,) = following._ready
            waiting.stack.callback(gone.set)
            if reason == "it has ended":
                vars(waiting.machine.vm)["has_ended"] = True
            else:
                following.coming.is_current = False
            assert following.take() is None
            await gone.wait()       # with its memory, though no other is wanted
            await settled()
            assert following.log == ["came 0", "went 0"]


async def test_what_waits_for_the_next_fork_counts_with_the_memory_that_it_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    @asynccontextmanager
    async def admitted_now(cost: int) -> AsyncIterator[bool]:
        asked.append(cost)
        yield True

    monkeypatch.setattr(spares, "admitted_now", admitted_now)
    with anyio.fail_after(300):
        for size in (0, 100 * MIB, ahead.MOST, ahead.MOST + 4096):
            following = Next(size)
            async with alongside(following.fill()):
                following.want()
                await following.filled()
            assert (following.take() is not None) == (size <= ahead.MOST)
    assert asked == [RESTORED, RESTORED + 100 * MIB, RESTORED + ahead.MOST]


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
            assert one.take() is None
    assert given == [bundle]


async def test_a_machine_that_is_not_paused_is_not_at_rest() -> None:
    done: list[str] = []

    async def rest() -> None:
        done.append("rest")

    async def fail() -> None:
        raise VMError("it doesn't answer")

    async def settled() -> None:
        done.append("settled")

    agent = SimpleNamespace(rest=rest, go_on=lambda: done.append("go on"))
    running: Any = SimpleNamespace(
        making=asyncio.Lock(), agent=agent, vm=SimpleNamespace(pause=fail), is_paused=False,
        settled=settled,
    )  # fmt: skip
    with pytest.raises(VMError):
        await saving.pause(running)
    assert done == ["settled", "rest", "go on"]
    assert not running.is_paused
