"""Trees of files between the host and a container in a real guest."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from pykata import ConfigError, Container, FileError, FileMissingError, HostError, Sandbox, UnsafeTreeError
from tests.unit.test_files_extract import contents

BUSYBOX = "builtin:busybox"
MIB = 1024 * 1024


@pytest.fixture
async def box(sb: Sandbox) -> AsyncIterator[Container]:
    async with sb.container(BUSYBOX) as container:
        yield container


async def out(box: Container, script: str) -> str:
    return (await box.run(["sh", "-c", script], check=True)).stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree with something of each kind."""
    top = tmp_path / "source"
    (top / "deep" / ("d" * 120) / ("e" * 120)).mkdir(parents=True)
    (top / "deep" / ("d" * 120) / ("e" * 120) / ("f" * 255)).write_bytes(b"long")
    (top / "empty").touch()
    (top / "data").write_bytes(os.urandom(700_000))
    (top / "hard").hardlink_to(top / "data")
    (top / "link").symlink_to("/etc/passwd")
    (top / "dangling").symlink_to("x" * 200)
    Path(os.fsdecode(os.fsencode(top) + b"/\xff\n")).write_text("not UTF-8")
    with (top / "sparse").open("wb") as file:
        file.seek(5 * 1024 * MIB)
        file.write(b"end")
    (top / "run").write_text("#!/bin/sh\necho ran\n")
    (top / "run").chmod(0o755)
    (top / "many").mkdir()
    for number in range(500):
        (top / "many" / f"{number}").write_text(str(number))
    for number, path in enumerate(sorted(top.rglob("*"))):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789 + number), follow_symlinks=False)
    (top / "many").chmod(0o711)
    return top


def attributes(top: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in [top, *top.rglob("*")]:
        known = path.lstat()
        mode = 0 if stat.S_ISLNK(known.st_mode) else known.st_mode
        found[str(path.relative_to(top))] = (mode, known.st_mtime_ns, known.st_nlink if path.is_file() else 0)
    return found


async def test_there_and_back(box: Container, source: Path, tmp_path: Path) -> None:
    (source / "sparse").unlink()
    up = await box.files.upload(source, "/new/top")
    assert (up.size, up.skipped) == (sum(len(str(n)) for n in range(500)) + 700_000 + 9 + 4 + 19, ())
    said = await out(box, "cd /new/top; ./run; head -c 4 link; stat -c '%u %a' many")
    assert said == "ran\nroot0 711\n"
    back = tmp_path / "back"
    down = await box.files.download("/new/top", back)
    assert (down.entries, down.size) == (up.entries, up.size)
    assert contents(back) == contents(source)
    assert attributes(back) == attributes(source)


async def test_holes_stay_holes(box: Container, source: Path, tmp_path: Path) -> None:
    await box.files.upload(source / "sparse", "/f")
    await box.files.upload(source, "/top")
    assert await out(box, "stat -c %s /top/sparse; du -k /top/sparse | cut -f1") == f"{5 * 1024 * MIB + 3}\n4\n"
    await box.files.download("/top/sparse", tmp_path / "sparse")
    found = (tmp_path / "sparse").stat()
    assert (found.st_size, found.st_blocks * 512 <= 8192) == (5 * 1024 * MIB + 3, True)


async def test_one_file(box: Container, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(b"x" * 3 * MIB)
    local.chmod(0o4751)
    os.utime(local, ns=(0, 1_111_111_111_222_333_444))
    await box.files.upload(local, "/named", owner=(5, 6))
    found = await box.files.stat("/named")
    assert (found.mode, found.mtime_ns, found.uid, found.gid) == (0o751, 1_111_111_111_222_333_444, 5, 6)
    await box.files.upload(local, "/tmp", setuid=True)
    assert (await box.files.stat("/tmp/local")).mode == 0o4751
    await box.files.download("/named", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == local.read_bytes()
    assert (tmp_path / "back").stat().st_mtime_ns == 1_111_111_111_222_333_444
    (tmp_path / "folder").mkdir()
    await box.files.download("/named", tmp_path / "folder")
    assert os.listdir(tmp_path / "folder") == ["named"]


async def test_owners(box: Container, tmp_path: Path) -> None:
    (tmp_path / "t" / "d").mkdir(parents=True)
    (tmp_path / "t" / "f").touch()
    os.chown(tmp_path / "t" / "f", 123, 456)
    await box.files.upload(tmp_path / "t", "/kept", keep_owners=True)
    await box.files.upload(tmp_path / "t", "/given", owner=(7, 8))
    await box.files.chmod("/", 0o777)
    await box.files.as_user("65534:65534").upload(tmp_path / "t", "/nobodys")
    assert await out(box, "stat -c %u:%g /kept/f /given/f /given/d /nobodys/f") == "123:456\n7:8\n7:8\n65534:65534\n"


async def test_what_is_there_is_replaced_or_stays(box: Container, tmp_path: Path) -> None:
    (tmp_path / "t" / "d").mkdir(parents=True)
    (tmp_path / "t" / "f").write_text("new")
    (tmp_path / "t" / "d" / "g").write_text("new")
    await out(box, "mkdir -p /t/d; echo old > /target; ln -s /target /t/f; echo old > /t/other")
    await box.files.upload(tmp_path / "t", "/t")
    assert await out(box, "cat /t/f /t/d/g /target /t/other") == "newnewold\nold\n"
    await out(box, "rm -r /t/d; mkdir /elsewhere; ln -s /elsewhere /t/d")
    with pytest.raises(FileError, match="'/t/d'"):
        await box.files.upload(tmp_path / "t", "/t")
    assert await box.files.list("/elsewhere") == [], "a symlink was followed"


async def test_failures_name_what_failed(box: Container, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none"):
        await box.files.upload(tmp_path / "none", "/x")
    with pytest.raises(FileMissingError, match="/none"):
        await box.files.download("/none", tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="file"):
        await box.files.download("/etc", tmp_path / "file")
    with pytest.raises(UnsafeTreeError, match="max_size"):
        await box.files.download("/bin", tmp_path / "bin", max_size=1000)
    with pytest.raises(UnsafeTreeError, match="max_entries"):
        await box.files.download("/etc", tmp_path / "etc", max_entries=1)
    await out(box, "mkdir -m 700 /closed; echo x > /closed/f; chmod 0 /closed/f; chmod 755 /closed")
    with pytest.raises(FileError, match="closed/f"):
        await box.files.as_user("65534").download("/closed", tmp_path / "closed")


async def test_a_tree_that_changes_while_it_is_read(box: Container, tmp_path: Path) -> None:
    change = "seq 1 $((RANDOM)) > f$n; mkdir -p d$n/e; rm -rf d$n"
    script = f"cd /t; while :; do for n in 1 2 3 4 5 6; do {change}; done; done"
    await out(box, "mkdir /t")
    async with box.process(["sh", "-c", script]):
        for number in range(10):
            await box.files.download("/t", tmp_path / str(number))


async def test_cancelled_transfers(box: Container, source: Path, tmp_path: Path) -> None:
    (source / "sparse").unlink()
    await box.files.upload(source, "/top")
    for number, patience in enumerate((0.0, 0.01, 0.02, 0.05, 0.1)):
        with anyio.move_on_after(patience):
            await box.files.upload(source, f"/partly{number}")
        with anyio.move_on_after(patience):
            await box.files.download("/top", tmp_path / f"partly{number}")
        with anyio.move_on_after(patience):
            await box.files.download("/top/data", tmp_path / f"file{number}")
        assert (tmp_path / f"file{number}").exists() in (True, False)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".pykata")]
    await box.files.download("/top", tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(source)
