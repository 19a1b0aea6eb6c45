"""A directory with 100,000 files, by each way that a container can have it. They are made here: a guest is slow."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from pykata import Bind, DiskImage, FsspecVolume, Sandbox
from tests.unit.memory_tree import Memory

BUSYBOX = "builtin:busybox"
COUNT = 100_000

# All names, one file of them, one less, one more.
WORK = f"""set -- *; echo $#; cat {COUNT // 2}; rm {COUNT // 3} && [ ! -e {COUNT // 3} ] && echo gone
set -- *; echo $#; echo new > new && cat new; set -- *; echo $#"""
SAID = ["100000", "kept", "gone", "99999", "new", "100000"]


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "tree"
    (root / "bin").mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    for name in ("sh", "cat", "rm"):
        shutil.copy(busybox, root / "bin" / name)
    fill(root)
    yield root
    shutil.rmtree(root)


def fill(root: Path) -> None:
    many = root / "many"
    many.mkdir()
    for number in range(COUNT):
        os.close(os.open(many / str(number), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    (many / str(COUNT // 2)).write_text("kept\n")


async def tried(volume: Any) -> list[str]:
    async with Sandbox(isolation="emulated", template="off", memory="512M", volumes={"/v": volume}) as sb:
        return (await sb.run(BUSYBOX, ["sh", "-c", f"cd /v/many; {WORK}"], check=True)).stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "always", "none"])
@pytest.mark.parametrize("via", ["virtiofs", "9p"])
async def test_a_directory_of_this_machine(tree: Path, via: Any, cache: Any) -> None:
    assert await tried(Bind(tree, via=via, cache=cache)) == SAID
    names = os.listdir(tree / "many")
    assert len(names) == COUNT
    assert "new" in names


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """By this machine's kernel: mkfs.ext4 -d looks at all names for each that it adds."""
    disk, place = tmp_path / "disk", tmp_path / "mounted"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-N", str(COUNT + 1000), disk, "256M"], check=True)
    subprocess.run(["mount", "--mkdir", disk, place], check=True)
    try:
        fill(place)
    finally:
        subprocess.run(["umount", place], check=True)
    return disk


@pytest.mark.slow
async def test_a_disk(disk: Path) -> None:
    assert await tried(DiskImage(disk)) == SAID
    checked = await anyio.run_process(["e2fsck", "-fn", str(disk)], check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
async def test_a_filesystem_of_python() -> None:
    files = Memory()
    for number in range(COUNT):
        files.pipe_file(f"/large/many/{number}", b"kept\n" if number == COUNT // 2 else b"")
    assert await tried(FsspecVolume(files, "/large", timeout=60)) == SAID


@pytest.mark.slow
@pytest.mark.parametrize("fs", ["block", "virtiofs", "9p"])
async def test_an_image(tree: Path, fs: str) -> None:
    async with Sandbox(isolation="emulated", template="off", memory="512M", fs=fs) as sb:
        done = await sb.run(f"dir:{tree}", ["/bin/sh", "-c", f"cd /many; {WORK}"], check=True)
    assert done.stdout.split() == SAID
