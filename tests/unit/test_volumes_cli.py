"""``pykata volumes``: what is listed, what is removed, and what is left because a sandbox uses it."""

from __future__ import annotations

import json
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from pykata_cli import main
from pykata_cli.parser import parse

from pykata import Bind, HostError, Named, VolumeInUseError, describe_volumes, list_volumes, remove_volume, sync
from pykata.spec import MIB, Image
from pykata.volumes import check_volumes
from pykata.volumes.attached import attached
from pykata.volumes.marks import is_marked, marked


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes of the test's own."""
    monkeypatch.setenv("PYKATA_STATE", str(tmp_path / "state"))


@pytest.mark.parametrize("argv", [["-v", "rm", "x"], ["rm", "-v", "x"], ["-v"], ["-v", "rm", "-v", "x"]])
def test_verbose_on_either_side_of_the_verb(argv: list[str]) -> None:
    assert parse(["volumes", *argv]).verbose
    assert not parse(["volumes", *(word for word in argv if word != "-v")]).verbose


def made(name: str) -> Path:
    """A named volume without a size, as a sandbox makes it."""
    (volume,) = check_volumes({"/v": Named(name, via="9p")}).values()
    assert isinstance(volume, Bind)
    return volume.path


def made_disk(name: str, size: int) -> Path:
    """The file of a named volume with a size, without a filesystem."""
    path = made("x").with_name(".disks") / name
    remove_volume("x")
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        file.truncate(size)
    return path


async def nothing(name: str) -> Image:
    raise AssertionError(name)


# --- listing ---


def test_no_volumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["volumes"]) == 0
    assert capsys.readouterr() == ("NAME  SIZE  LIMIT  CHANGED  USED\n", "")
    assert main(["volumes", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    (made("results") / "file").write_bytes(os.urandom(MIB))
    made_disk("data", 8 * MIB)
    with marked(made("results")):
        assert main(["volumes"]) == 0
    head, data, results = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "SIZE", "LIMIT", "CHANGED", "USED"]
    assert [data.split()[0], *data.split()[3:5], data.split()[-1]] == ["data", "8.0", "MiB", "-"]
    assert results.split()[0] == "results"
    assert results.split()[3] == "-"
    assert results.split()[-1] == "yes"


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    folder = made("results")
    (folder / "below").mkdir()
    (folder / "below" / "file").write_bytes(os.urandom(MIB))
    os.link(folder / "below" / "file", folder / "again")
    os.utime(folder / "again", (0, 0))
    (folder / "elsewhere").symlink_to("/usr")
    disk = made_disk("data", 64 * MIB)
    assert main(["volumes", "--format", "json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    # What a filesystem allocates for a directory or a file of nothing is its own affair.
    assert MIB <= second.pop("size") < 2 * MIB, "a file counts once, and what a link leads to not at all"
    assert first.pop("size") < MIB, "nothing was written yet"
    newest = max(os.lstat(path).st_ctime for path in (folder, *folder.rglob("*")))
    assert second.pop("changed") == int(newest), "which a guest can't set"
    assert first == {"name": "data", "limit": 64 * MIB, "changed": int(disk.stat().st_ctime), "in_use": False}
    assert second == {"name": "results", "limit": None, "in_use": False}


async def test_what_isnt_a_volume_any_more_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [made("there"), made("gone")]
    remove_volume("gone")
    monkeypatch.setattr("pykata.volumes.stored.named_paths", lambda: paths)
    assert [volume.name for volume in await describe_volumes()] == ["there"]


# --- who uses one ---


async def test_a_sandbox_marks_what_it_uses(tmp_path: Path) -> None:
    used, other = made("used"), made("other")
    volumes = check_volumes({"/used": Named("used", readonly=True, via="9p"), "/b": Bind(tmp_path, via="9p")})
    async with AsyncExitStack() as stack:
        for _ in range(2):              # several may
            await stack.enter_async_context(attached(volumes, tmp_path, nothing))
        assert {volume.name: volume.in_use for volume in await describe_volumes()} == {"used": True, "other": False}
        assert not is_marked(tmp_path), "a directory of somebody's own has no marks"
        with pytest.raises(VolumeInUseError, match=r"a sandbox uses the volume 'used' \(end it first"):
            remove_volume("used", force=False)
    assert not is_marked(used)
    remove_volume("used", force=False)
    remove_volume("other", force=False)
    assert not used.exists()
    assert not other.exists()


def test_a_directory_of_that_name_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pykata.volumes import named

    def none() -> Path:
        raise HostError("there is no home")

    assert named.is_named(made("a"))
    assert not named.is_named(tmp_path / "volumes" / "a")
    monkeypatch.setattr(named, "state_dir", none)
    assert not named.is_named(tmp_path / "a"), "who has no named volumes needs no home"


def test_where_there_are_no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> bool:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("pykata.volumes.marks.lock_byte", none)
    monkeypatch.setattr("pykata.volumes.marks.byte_is_locked", none)
    with marked(made("a")):
        assert not is_marked(made("a"))
        remove_volume("a", force=False)
    with marked(Path("/nowhere")):
        assert not is_marked(Path("/nowhere"))


# --- removing ---


def test_several_are_removed(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        (made(name) / "file").touch()
    made_disk("d", MIB)
    assert main(["volumes", "rm", "a", "c", "d"]) == 0
    assert capsys.readouterr() == ("a\nc\nd\n", "")
    assert list_volumes() == ["b"]


def test_those_that_arent_there_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    made("a")
    made("b")
    assert main(["volumes", "rm", "no", "a", "none"]) == 1
    out, err = capsys.readouterr()
    assert out == "a\n"
    assert err == ("pykata: there is no volume 'no' (there are a, b)\n"
                   "pykata: there is no volume 'none' (there are b)\n")


@pytest.mark.parametrize("is_disk", [False, True])
def test_one_that_a_sandbox_uses(capsys: pytest.CaptureFixture[str], is_disk: bool) -> None:
    path = made_disk("used", MIB) if is_disk else made("used")
    made("free")
    with marked(path):
        assert main(["volumes", "rm", "used", "free"]) == 1
        out, err = capsys.readouterr()
        assert out == "free\n"
        assert err.startswith("pykata: a sandbox uses the volume 'used' (end it first")
        assert list_volumes() == ["used"]
        assert main(["volumes", "rm", "--force", "used"]) == 0
    assert list_volumes() == []


@pytest.mark.parametrize("name", ["..", ".disks", "a/b", "/", ""])
def test_what_is_no_name_removes_nothing(capsys: pytest.CaptureFixture[str], name: str) -> None:
    made("a")
    assert main(["volumes", "rm", "a", name]) == 125
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"pykata: {name!r} is no name of a volume (letters")
    assert list_volumes() == ["a"]


def fill_deep(folder: Path, depth: int) -> None:
    """Directories in directories, more than a path can name."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_a_volume_deeper_than_a_path_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    fill_deep(made("deep"), 3000)
    assert main(["volumes"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "deep"
    assert main(["volumes", "rm", "deep"]) == 0
    assert list(made("x").parent.iterdir()) == [made("x")], "nothing of it is left under another name"


def test_one_that_cant_be_removed_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    made("a")
    monkeypatch.setattr("pykata.volumes.named.remove_tree", fails)
    assert main(["volumes", "rm", "a"]) == 1
    assert "volume 'a' can't be removed whole: [Errno 16] Device or resource busy (remove /" in capsys.readouterr().err


def test_from_synchronous_code() -> None:
    made("a")
    [found] = sync.describe_volumes()
    assert (found.name, found.limit, found.in_use) == ("a", None, False)
