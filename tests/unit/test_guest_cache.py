"""The cache of bundles: whole entries, one builder, nothing left over."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import anyio
import pytest

from pykata.guest.cache import locked, publish, scratch
from pykata.guest.inputs import mapping_hash

pytestmark = pytest.mark.anyio


def never(holder: str) -> None:
    raise AssertionError(f"waited for {holder}")


async def test_one_builder_at_a_time_and_the_other_is_told_whom_it_waits_for(tmp_path: Path) -> None:
    order: list[str] = []
    waiting = anyio.Event()

    def told(holder: str) -> None:
        order.append(holder)
        waiting.set()

    async def second() -> None:
        async with locked(tmp_path, told):
            order.append("second")

    async with anyio.create_task_group() as tasks, locked(tmp_path, never):
        tasks.start_soon(second)
        await waiting.wait()
        order.append("first")
    assert order[0].startswith(f"process {os.getpid()} (")
    assert order[1:] == ["first", "second"]


async def test_waiting_for_the_lock_can_be_cancelled_and_does_not_keep_it(tmp_path: Path) -> None:
    async with locked(tmp_path, never):
        with anyio.move_on_after(0.1) as scope:
            async with locked(tmp_path, lambda holder: None):
                raise AssertionError("got a lock that is held")
        assert scope.cancelled_caught
    fd = os.open(tmp_path / "lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


async def test_what_a_dead_builder_left_is_collected(tmp_path: Path) -> None:
    (tmp_path / "tmp-dead" / "deep").mkdir(parents=True)
    (tmp_path / "x86_64-kept").mkdir()
    async with locked(tmp_path, never):
        assert sorted(os.listdir(tmp_path)) == ["lock", "x86_64-kept"]


def test_an_entry_appears_as_a_whole_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    target.mkdir()
    (target / "damaged").touch()
    with scratch(tmp_path) as work:
        out = work / "out"
        out.mkdir()
        (out / "file").write_text("whole")
        publish(out, target)
    assert [path.name for path in target.iterdir()] == ["file"]


def test_scratch_is_gone_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyError), scratch(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_hash_of_names_and_values_ignores_their_order() -> None:
    assert mapping_hash({"a": "1", "b": "2"}) == mapping_hash({"b": "2", "a": "1"})
    assert mapping_hash({"a": "1", "b": "2"}) != mapping_hash({"a": "1", "b": "3"})
