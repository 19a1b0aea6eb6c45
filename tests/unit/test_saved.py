
"""Saved guests on disk, the cache of templates, and the agent's parked connections: nothing is booted."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from attrs import evolve, frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from pykata import Sandbox, TemplateWarning, restore, saved, saved_disks, saving, template_cache
from pykata.agent.parking import MOST_LEFT, Greeting, Parking
from pykata.errors import (
    AgentProtocolError,
    ConfigError,
    SandboxClosedError,
    SavedDamagedError,
    SavedElsewhereError,
    SavedMissingError,
    VMError,
)
from pykata.host import file_hash, held, memory_file, seal
from pykata.hypervisors.qemu import QEMU
from pykata.loading import loading
from pykata.options import Options
from pykata.origin import Origin, SavedContainer
from pykata.spec import Disk, ImageConfig, SavedVM
from pykata.testing import FakeFs, FakeHypervisor, fake_bundle

SIZE = 1 << 20
SETTINGS = b"\0\0\6\4\0\0\0\0\0" + b"\0\3\0\0\0\x64"
ACK = b"\0\0\0\4\1\0\0\0\0"


@contextmanager
def guest(disk: Path | None = None) -> Iterator[Origin]:
    """A saved guest that never was one."""
    with memory_file(SIZE) as memory, held(memory) as file:
        os.pwrite(memory, b"first", 0)
        os.pwrite(memory, b"in the middle", 500_000)
        seal(memory)
        vm = SavedVM(file, b"devices", {3: Disk("d", disk, "qcow2")} if disk else {})
        config = ImageConfig(entrypoint=("/bin/x",), cmd=("y",), env={"A": "1"})
        container = SavedContainer("c1", "image", "sha256:0", config, "x86_64", disk=123, fresh=True)
        yield Origin(
            vm=vm, greeting=SETTINGS, parked=True, memory_limit=1, start="template", containers=(container,),
            main="c2", next_number=7, identity={"cpu": "this"},
        )  # fmt: skip


QCOW2 = b"QFI\xfb\0\0\0\2".ljust(512, b"\0").replace(b"\0" * 16, b"\0" * 15 + b"\x10", 1)


def test_a_disk_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"image")
    with guest(tmp_path / "disk") as origin:
        saved.write(tmp_path / "saved", origin)
    with pytest.raises(SavedDamagedError, match="slot3: it is no qcow2"), saved.opened(tmp_path / "saved", "snapshot"):
        pass


@pytest.fixture
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_no_umask")
def test_what_was_written_is_read(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(QCOW2)
    with guest(disk) as origin:
        saved.write(tmp_path / "saved", origin)
    disk.write_bytes(b"what becomes of the image is nothing to who was saved with it")
    assert (tmp_path / "saved" / "memory").stat().st_size < SIZE
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "saved").iterdir()} == {"0o600"}
    assert saved.identity(tmp_path / "saved") == {"cpu": "this"}
    with saved.opened(tmp_path / "saved", "snapshot") as again:
        assert os.pread(again.vm.memory, 5, 0) == b"first"
        assert os.pread(again.vm.memory, 13, 500_000) == b"in the middle"
        assert os.fstat(again.vm.memory).st_size == SIZE
        assert again.vm.slots[3].path.read_bytes() == QCOW2
        assert again.vm.slots[3].format == "qcow2"
        assert (again.vm.devices, again.greeting, again.parked) == (b"devices", SETTINGS, True)
        assert (again.containers, again.main, again.next_number) == (origin.containers, "c2", 7)
        with pytest.raises(PermissionError):
            os.pwrite(again.vm.memory, b"x", 0)
    with pytest.raises(SandboxClosedError, match="was left"):
        again.vm.memory  # noqa: B018  its number may be another file's by now


def test_zeros_are_not_written(tmp_path: Path) -> None:
    page = os.urandom(4096)
    with memory_file(SIZE) as memory, held(memory) as file:
        os.pwrite(memory, bytes(SIZE - 4096), 0)        # the last page is a hole
        for at in (0, 3 * saved.PIECE - 4096, 5 * saved.PIECE):
            os.pwrite(memory, page, at)
        before = os.pread(memory, SIZE, 0)
        vm = SavedVM(file, b"devices")
        saved.write(tmp_path / "saved", Origin(vm=vm, greeting=b"", parked=True, memory_limit=1, start="template"))
    assert (tmp_path / "saved" / "memory").stat().st_size == 3 * saved.PIECE
    with saved.opened(tmp_path / "saved", "snapshot") as again:
        assert os.pread(again.vm.memory, SIZE, 0) == before


@pytest.mark.parametrize("name", ["memory", "devices", "state.json", "slot3"])
@pytest.mark.parametrize("how", ["flipped", "shorter", "longer", "empty", "missing", "fifo"])
def test_no_damage_goes_unseen(tmp_path: Path, name: str, how: str) -> None:
    (tmp_path / "disk").write_bytes(QCOW2)
    with guest(tmp_path / "disk") as origin:
        saved.write(tmp_path / "saved", origin)
    path = tmp_path / "saved" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = {"flipped": bytes(data), "shorter": path.read_bytes()[:-1], "longer": path.read_bytes() + b"x"}
    path.unlink()
    if how == "fifo":
        os.mkfifo(path)
    elif how != "missing":
        path.write_bytes(damaged.get(how, b""))
        os.utime(path, ns=(0, 0))       # older kernels' clocks for files tick every 4 ms
    with pytest.raises(SavedDamagedError, match=str(tmp_path)), saved.opened(tmp_path / "saved", "template"):
        pass


def test_a_disk_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    def digest(path: Path, digest: Callable[[Path], str] = file_hash) -> str:
        hashed.append(path.name)
        return digest(path)

    def start() -> list[str]:
        """What a new process hashes."""
        hashed.clear()
        monkeypatch.setattr(saved_disks, "_verified", {})
        with saved.opened(folder, "template"):
            pass
        return list(hashed)

    monkeypatch.setattr(saved_disks, "file_hash", digest)
    (tmp_path / "disk").write_bytes(QCOW2)
    folder = tmp_path / "saved"
    with guest(tmp_path / "disk") as origin:
        saved.write(folder, origin)
    assert hashed == ["slot3"]
    assert start() == []
    (folder / "slot3").rename(tmp_path / "slot3")
    shutil.copyfile(tmp_path / "slot3", folder / "slot3")       # by whoever restores a backup
    assert start() == ["slot3"]
    assert start() == []
    (folder / saved_disks.NOTES).write_text("{")
    assert start() == ["slot3"]
    (tmp_path / "boot_id").write_text("another boot: what was noted before may never have reached the disk")
    monkeypatch.setattr(saved_disks, "BOOT_ID", tmp_path / "boot_id")
    assert start() == ["slot3"]
    assert start() == []


def test_there_is_nothing_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(SavedMissingError, match="no saved guest"):
        saved.identity(tmp_path / "none")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path):
        with pytest.raises(SavedDamagedError, match=str(place)):
            saved.identity(place)


async def test_the_cache_keeps_and_discards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path))
    folder = template_cache.folder_of({"a": "1"})
    assert folder != template_cache.folder_of({"a": "2"})
    async with template_cache.loaded(folder) as nothing:
        assert nothing is None
    killed = folder.with_name("tmp-0123")       # by somebody who was killed
    killed.mkdir()
    with guest() as origin, template_cache.turn_to_make(folder) as ours:
        assert ours
        with template_cache.turn_to_make(folder) as others:
            assert not others
        template_cache.keep(folder, origin)
    assert not killed.exists()
    async with template_cache.loaded(folder) as one, template_cache.loaded(folder) as other:
        assert one is other is not None
    (folder / "devices").write_bytes(b"other")
    with pytest.warns(TemplateWarning, match="devices"):
        async with template_cache.loaded(folder) as damaged:
            assert damaged is None
    assert not folder.exists()
    folder.write_text("no template")
    with pytest.warns(TemplateWarning, match="Not a directory"):
        async with template_cache.loaded(folder) as damaged:
            assert damaged is None
    assert not folder.exists()


async def test_memory_that_is_damaged_is_found_while_a_machine_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path))
    folder = template_cache.folder_of({"a": "1"})
    with guest() as origin:
        template_cache.keep(folder, origin)
    data = bytearray((folder / "memory").read_bytes())
    data[0] ^= 1
    (folder / "memory").write_bytes(data)
    async with template_cache.loaded(folder) as one, template_cache.loaded(folder) as other:
        assert one is not None
        assert one is other
        assert one.vm.whole is not None
        with pytest.raises(SavedDamagedError, match="memory isn't what was saved") as damaged:
            await one.vm.whole()
        with pytest.warns(TemplateWarning, match="memory isn't what was saved"):
            template_cache.drop(folder, one, damaged.value)
        template_cache.drop(folder, one, damaged.value)     # nor is there a second warning
        async with template_cache.loaded(folder) as third:
            assert third is None
    assert not folder.exists()


async def test_what_somebody_else_has_made_anew_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path))
    folder = template_cache.folder_of({"a": "1"})
    with guest() as origin:
        template_cache.keep(folder, origin)
    async with template_cache.loaded(folder) as bad:
        assert bad is not None
        shutil.rmtree(folder)
        with guest() as origin:
            template_cache.keep(folder, origin)
        template_cache.drop(folder, bad, VMError("it ended"))
        assert folder.exists()
        async with template_cache.loaded(folder) as good:
            assert good is not None
            assert good is not bad
            template_cache.drop(folder, bad, VMError("it ended"))       # found out late
            assert folder.exists()
            with pytest.warns(TemplateWarning, match="it ended"):
                template_cache.drop(folder, good, VMError("it ended"))
            assert not folder.exists()


async def test_what_is_removed_while_it_is_loaded_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    with guest() as origin:
        saved.write(folder, origin)
    async with template_cache.loaded(folder) as one:
        assert one is not None
        assert one.vm.whole is not None
        shutil.rmtree(folder)
        await one.vm.whole()


async def test_who_gives_up_while_memory_is_loaded_leaves_no_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entered, go_on, left = threading.Event(), threading.Event(), list[int]()

    def slow(source: int, runs: object, digest: str, memory: int) -> None:
        entered.set()
        go_on.wait()
        left.append(os.fstat(memory).st_size)       # it is open still

    async def load() -> None:
        async with loading(tmp_path / "saved", "template") as origin:
            assert origin.vm.whole is not None
            await origin.vm.whole()

    monkeypatch.setattr(saved, "_read_memory", slow)
    with guest() as origin:
        saved.write(tmp_path / "saved", origin)
    task = asyncio.create_task(load())
    try:
        assert await anyio.to_thread.run_sync(entered.wait, 300)
        for _ in range(3):
            task.cancel()
            await anyio.lowlevel.checkpoint()
        assert not task.done()
    finally:
        go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left == [SIZE]


async def test_a_disk_that_goes_while_its_template_is_used_is_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path))
    (tmp_path / "disk").write_bytes(QCOW2)
    folder = template_cache.folder_of({"a": "1"})
    with guest(tmp_path / "disk") as origin:
        template_cache.keep(folder, origin)
    async with template_cache.loaded(folder) as first:
        assert first is not None
        (folder / "slot3").unlink()
        assert template_cache.is_stale(first)
        with pytest.warns(TemplateWarning, match="slot3 is missing"):
            async with template_cache.loaded(folder) as second:
                assert second is None
        with guest(tmp_path / "disk") as origin:
            template_cache.keep(folder, origin)
        async with template_cache.loaded(folder) as third:
            assert third is not None
            assert third is not first


@pytest.mark.parametrize(("text", "size"), [("", template_cache.MOST), ("5000", 5000), ("1G", 1 << 30)])
def test_how_much_templates_may_take(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("PYKATA_TEMPLATES_SIZE", text)
    assert template_cache.limit() == size
    monkeypatch.setenv("PYKATA_TEMPLATES_SIZE", "much")
    with pytest.raises(ConfigError, match="PYKATA_TEMPLATES_SIZE='much'"):
        template_cache.limit()


@frozen
class Saving(FakeHypervisor):
    """One whose machines could be saved."""

    def saving(self, identity: Mapping[str, str] | None = None) -> Saving:
        return self


async def started() -> tuple[str, str]:
    async with Sandbox(Saving(), FakeFs()) as sb:
        return sb.timings.start, sb.timings.why


async def test_where_no_template_can_be_kept_sandboxes_boot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path / "cache"))
    with fake_bundle(tmp_path):
        monkeypatch.setenv("PYKATA_TEMPLATES_SIZE", "much")
        async with Sandbox(Saving(), FakeFs()) as sb:
            assert "PYKATA_TEMPLATES_SIZE='much'" in sb.timings.why
        monkeypatch.delenv("PYKATA_TEMPLATES_SIZE")
        (tmp_path / "cache" / "templates").rmdir()
        (tmp_path / "cache" / "templates").write_text("")
        with pytest.warns(TemplateWarning, match="templates can't be kept.*File exists"):
            start, why = await started()
        assert start == "boot"
        assert "File exists" in why
        (tmp_path / "cache" / "templates").unlink()
        kind = template_cache.folder_of(restore.identity(Sandbox(Saving(), FakeFs()).options))
        kind.with_name(f"{kind.name}.lock").mkdir()
        with pytest.warns(TemplateWarning, match="Is a directory"):
            assert "Is a directory" in (await started())[1]


async def test_who_can_not_save_boots_and_says_why(tmp_path: Path) -> None:
    with fake_bundle(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("error")
        async with Sandbox(FakeHypervisor(), FakeFs(), template="auto") as sb:
            assert sb.timings.start == "boot"
            assert sb.timings.why == "fake can't save a virtual machine"


def test_a_greeting_is_found_behind_what_was_under_way() -> None:
    first = Greeting()
    assert first(SETTINGS[:4]) + first(SETTINGS[4:] + ACK) == SETTINGS + ACK
    assert first.frame == SETTINGS
    for cut in range(len(SETTINGS)):
        seeking = Greeting(first.frame)
        stream = b"the rest of a frame" + ACK + SETTINGS + b"more"
        at = len(stream) - len(SETTINGS) - 4 + cut
        assert seeking(stream[:at]) + seeking(stream[at:]) == SETTINGS + b"more"
    seeking = Greeting(first.frame)
    assert seeking(bytes(MOST_LEFT)) == b""
    with pytest.raises(AgentProtocolError, match="without greeting"):
        seeking(bytes(65536))


async def test_a_parked_connection_ends_with_the_next_greeting() -> None:
    parking = Parking()
    assert parking(ACK + SETTINGS[:5]) == b""
    assert not parking.done.done()
    parking(SETTINGS[5:])
    assert await parking.done == SETTINGS
    with pytest.raises(AgentProtocolError, match="isn't HTTP/2"):
        Parking()(b"\xff\xff\xff\0\0\0\0\0\0")


# --- snapshots ---


def test_writers_of_snapshots_are_not_in_each_others_way(tmp_path: Path) -> None:
    killed, barely = tmp_path / ".pykata-0.part", tmp_path / ".pykata-1.part"
    for left in (killed, barely):
        left.mkdir()
    for name in (saving.LOCK, "memory"):
        (killed / name).write_text("")
    with saving._part(tmp_path) as one, saving._part(tmp_path) as other:
        assert sorted(tmp_path.iterdir()) == sorted([one, other])
    assert list(tmp_path.iterdir()) == []
    with guest() as origin:
        saving._write(tmp_path / "saved", origin)
        with pytest.raises(OSError, match="not empty"):
            saving._write(tmp_path / "saved", origin)
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]
    with saved.opened(tmp_path / "saved", "snapshot") as again:
        assert again.main == "c2"


@pytest.mark.parametrize("path", ["", "/", ".", "..", "a\0b", "there"])
def test_where_no_snapshot_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="path="):
        saving._place(path)
    with pytest.raises(ConfigError, match="path=3 is not a path"):
        saving._place(3)  # type: ignore[arg-type]
    for none in (3, ""):
        with pytest.raises(ConfigError, match=f"path={none!r} is not a path"):
            Sandbox.restore(none)  # type: ignore[arg-type]
    assert saving._place("new/") == tmp_path / "new"
    assert saving._place("empty") == tmp_path / "empty"


THERE = {"hypervisor": "qemu", "machine": "q35", "slots": "7", "cpus": "2", "memory": "192", "reclaim": "False"}


def restored_as(there: Mapping[str, str], **options: Any) -> Options:
    return restore._as_saved(Sandbox.restore("/saved", **options).options, Path("/saved"), there)


def test_a_snapshot_has_the_machine_that_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QEMU, "accel_here", lambda self: "tcg")
    for like in ({}, {"hypervisor": "qemu"}):
        options = restored_as(THERE, **like)
        assert (options.cpus, options.memory, options.disk) == (2, 192, 96 << 20)
        assert options.hypervisor == QEMU(machine="q35", disk_slots=7, agent="serial", reclaim=False)
    assert restored_as(THERE, disk="8M").disk == 8 << 20
    asked = restored_as(THERE, memory="128M", hypervisor=QEMU(code_cache=16), cpus=1)
    here = {"memory": str(asked.memory), "cpus": str(asked.cpus), "machine": "microvm"}
    said = "cpus '2', here '1', machine 'q35', here 'microvm', memory '192', here '128'"
    with pytest.raises(ConfigError, match=said):
        restore._check_identity(Path("/saved"), THERE, THERE | here)
    with pytest.raises(SavedElsewhereError, match="build '1', here '2'"):
        restore._check_identity(Path("/saved"), {"build": "1"}, {"build": "2"})
    with pytest.raises(ConfigError, match="fs: a snapshot has no 9p"):
        Sandbox.restore("/saved", fs="9p")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([1 << 80, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "x"]), inner, max_size=2),
    max_leaves=4,
)


def crafted(state: Any, data: st.DataObject) -> Any:
    """The same, with anything in some place of it, or nothing."""
    if isinstance(state, dict | list) and state and data.draw(st.booleans()):
        state = state.copy()
        key = data.draw(st.sampled_from(sorted(state) if isinstance(state, dict) else range(len(state))))
        if data.draw(st.integers(0, 9)):
            state[key] = crafted(state[key], data)
        else:
            del state[key]
        return state
    return data.draw(ANYTHING)


@settings(max_examples=1000)
@given(data=st.data())
def test_no_crafted_snapshot_is_a_surprise(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(QEMU, "accel_here", lambda self: "tcg")
        folder = Path(name, "saved")
        Path(name, "disk").write_bytes(QCOW2)
        with guest(Path(name, "disk")) as origin:
            saved.write(folder, evolve(origin, identity=THERE))
        state = json.loads((folder / "state.json").read_text().partition("\n")[2])
        text = json.dumps(crafted(state, data))
        digest = hashlib.sha256(text.encode()).hexdigest()
        (folder / "state.json").write_text(f"{digest}\n{text}")
        with suppress(SavedDamagedError, SavedElsewhereError, ConfigError):
            there = saved.identity(folder)
            options = restored_as(there)
            restore._check_identity(folder, there, THERE | {"cpus": str(options.cpus)})
            with saved.opened(folder, "snapshot") as origin:
                next(itertools.count(origin.next_number + 1))
                assert all(disk.path.parent == folder for disk in origin.vm.slots.values())
                assert all(isinstance(each.id + each.config.user, str) for each in origin.containers)


@pytest.mark.parametrize(("field", "value"), [
    ("size", "1"), ("size", 1 << 80), ("next_number", None), ("identity", {"cpus": 2}), ("runs", [[0, SIZE + 4096]]),
    ("runs", [[4096, 0]]), ("disks", [{"number": "/../../disk", "format": "raw", "size": 1, "sha256": ""}]),
])  # fmt: skip
def test_what_a_saved_guest_can_not_be_is_named(tmp_path: Path, field: str, value: object) -> None:
    with guest() as origin:
        saved.write(tmp_path / "saved", origin)
    state = json.loads((tmp_path / "saved/state.json").read_text().partition("\n")[2])
    text = json.dumps(state | {field: value})
    (tmp_path / "saved/state.json").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    named = "memory beyond its size" if value == [[0, SIZE + 4096]] else f"no valid {field}"
    with pytest.raises(SavedDamagedError, match=named), saved.opened(tmp_path / "saved", "snapshot"):
        pass


@pytest.mark.parametrize("wrong", [{"cpus": "two"}, {"memory": ""}, {"slots": "x"}, {"hypervisor": "other"}])
def test_no_machine_has_that(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]) -> None:
    monkeypatch.setattr(QEMU, "accel_here", lambda self: "tcg")
    if "hypervisor" in wrong:
        assert restored_as(THERE | wrong).hypervisor == QEMU(agent="serial", reclaim=False)     # which is told later
        return
    with pytest.raises(SavedDamagedError, match="/saved is damaged"):
        restored_as(THERE | wrong)
