"""The cache of bundles: whole entries, one builder, nothing left over."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import anyio
import pytest

from pykata.errors import BundleMissingError
from pykata.guest import bundle, evict, in_use, load_bundle
from pykata.guest.cache import locked, part_path, publish, scratch
from pykata.guest.inputs import host_arch, mapping_hash, tree_hash
from tests.unit.test_guest_bundle import ROOT, make_bundle

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


# --- what nobody uses ---

DAYS = 24 * 3600.0


def age(path: Path, days: float) -> Path:
    then = time.time() - days * DAYS
    os.utime(path, (then, then))
    return path


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of bundles: the one of these sources, one that was used lately, and one that is old."""
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path))
    monkeypatch.delenv("PYKATA_BUNDLE", raising=False)
    monkeypatch.setattr(bundle, "WHEEL", "no_such_package")
    root, arch = tmp_path / "guest", host_arch()
    for name, days, kernel in (("current", 90, "a"), ("lately", 10, "b"), ("old", 31, "c")):
        tree = tree_hash(ROOT, arch) if name == "current" else name
        made = make_bundle(root / f"{arch}-{name}", tree=tree, inputs={"kernel": {"of": kernel}})
        age(made, days)
    for kernel in "abcd":
        part = part_path(root, "kernel", mapping_hash({"of": kernel}))
        part.mkdir(parents=True)
        age(part, 60)
    (root / "lock").touch()
    return root


def left(root: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in root.glob("*-*")} - {""}


def test_what_was_not_used_for_long_goes_with_its_parts(cached: Path) -> None:
    parts = {kernel: part_path(cached, "kernel", mapping_hash({"of": kernel})) for kernel in "abcd"}
    removed = evict()
    assert {path.name for path in removed} == {f"{host_arch()}-old", parts["c"].name, parts["d"].name}
    assert left(cached) == {"current", "lately"}
    assert [kernel for kernel, path in parts.items() if path.exists()] == ["a", "b"]
    assert evict() == []


def test_what_is_in_use_stays(cached: Path) -> None:
    old = load_bundle(cached / f"{host_arch()}-old")
    with in_use(old):
        age(old.path, 100)
        assert old.path not in evict()
        assert old.path.exists()
    age(old.path, 100)
    assert old.path in evict()
    with pytest.raises(BundleMissingError, match="is gone"), in_use(old):
        raise AssertionError("it isn't there")


def test_a_use_counts(cached: Path) -> None:
    old = load_bundle(cached / f"{host_arch()}-old")
    with in_use(old):
        pass
    assert evict() == [part_path(cached, "kernel", mapping_hash({"of": "d"}))]


async def test_nothing_goes_while_somebody_builds(cached: Path) -> None:
    async with locked(cached, never):
        assert evict() == []
    assert left(cached) == {"current", "lately", "old"}
