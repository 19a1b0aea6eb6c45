
"""Saved guests on disk, the cache of templates, and the agent's parked connections: nothing is booted."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pykata import Sandbox, TemplateWarning, saved, template_cache
from pykata.agent.parking import MOST_LEFT, Greeting, Parking
from pykata.errors import AgentProtocolError, SavedDamagedError
from pykata.host import memory_file, seal
from pykata.origin import Origin, SavedContainer
from pykata.spec import Disk, ImageConfig, SavedVM
from pykata.testing import FakeFs, FakeHypervisor, fake_bundle

SIZE = 1 << 20
SETTINGS = b"\0\0\6\4\0\0\0\0\0" + b"\0\3\0\0\0\x64"
ACK = b"\0\0\0\4\1\0\0\0\0"


@contextmanager
def guest(disk: Path | None = None) -> Iterator[Origin]:
    """A saved guest that never was one."""
    with memory_file(SIZE) as memory:
        os.pwrite(memory, b"first", 0)
        os.pwrite(memory, b"in the middle", 500_000)
        seal(memory)
        vm = SavedVM(memory, b"devices", {3: Disk("d", disk, "qcow2")} if disk else {})
        config = ImageConfig(entrypoint=("/bin/x",), cmd=("y",), env={"A": "1"})
        container = SavedContainer("c1", "image", "sha256:0", config, "x86_64", disk=123, fresh=True)
        yield Origin(
            vm=vm, greeting=SETTINGS, parked=True, memory_limit=1, start="template", containers=(container,),
            main="c2", next_number=7, identity={"cpu": "this"},
        )  # fmt: skip


def test_what_was_written_is_read(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"image")
    with guest(disk) as origin:
        saved.write(tmp_path / "saved", origin)
    with pytest.raises(SavedDamagedError, match="slot3: it is no qcow2"), saved.opened(tmp_path / "saved", "snapshot"):
        pass
    disk.write_bytes(b"QFI\xfb\0\0\0\2".ljust(512, b"\0").replace(b"\0" * 16, b"\0" * 15 + b"\x10", 1))
    assert (tmp_path / "saved" / "memory").stat().st_size < SIZE
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "saved").glob("[dms]*[!3]")} == {"0o600"}
    assert saved.identity(tmp_path / "saved") == {"cpu": "this"}
    with saved.opened(tmp_path / "saved", "snapshot") as again:
        assert os.pread(again.vm.memory, 5, 0) == b"first"
        assert os.pread(again.vm.memory, 13, 500_000) == b"in the middle"
        assert os.fstat(again.vm.memory).st_size == SIZE
        assert again.vm.slots[3].path.read_bytes() == disk.read_bytes()
        assert again.vm.slots[3].format == "qcow2"
        assert (again.vm.devices, again.greeting, again.parked) == (b"devices", SETTINGS, True)
        assert (again.containers, again.main, again.next_number) == (origin.containers, "c2", 7)
        with pytest.raises(PermissionError):
            os.pwrite(again.vm.memory, b"x", 0)


@pytest.mark.parametrize("name", ["memory", "devices", "state.json"])
@pytest.mark.parametrize("how", ["flipped", "shorter", "longer", "empty", "missing"])
def test_no_damage_goes_unseen(tmp_path: Path, name: str, how: str) -> None:
    with guest() as origin:
        saved.write(tmp_path / "saved", origin)
    path = tmp_path / "saved" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = {"flipped": bytes(data), "shorter": path.read_bytes()[:-1], "longer": path.read_bytes() + b"x"}
    path.unlink()
    if how != "missing":
        path.write_bytes(damaged.get(how, b""))
    with pytest.raises(SavedDamagedError, match=str(tmp_path)), saved.opened(tmp_path / "saved", "template"):
        pass


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
