"""Disks that guests map: their pages are those of the host's page cache, for all guests at a time."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from pykata import QEMU, ConfigError, DiskImage, NotPermittedError, Sandbox

BUSYBOX = "builtin:busybox"
CONTENT = 16 << 20
CACHED = "grep -w Cached /proc/meminfo"
SHOW = f"grep ' /v ' /proc/mounts; {CACHED}; md5sum < /v/big; {CACHED}; echo x > /v/f"


async def mkfs(tree: Path, image: Path, size: str, block: int = 4096) -> None:
    await anyio.run_process(["mkfs.ext4", "-q", "-F", "-b", str(block), "-d", tree, image, size])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/big").write_bytes(os.urandom(CONTENT))
    return tmp_path / "tree"


@pytest.fixture
async def image(tree: Path) -> Path:
    await mkfs(tree, tree.parent / "image", "32M")
    return tree.parent / "image"


def sandbox(volume: DiskImage, machine: str = "q35") -> Sandbox:
    hypervisor = QEMU(machine=machine)  # type: ignore[arg-type]
    return Sandbox(hypervisor, isolation="emulated", template="off", volumes={"/v": volume}, memory="128M")


def shared_by_mappings(image: Path) -> list[int]:
    """KiB that each process which maps the file shares with another one."""
    out = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "smaps").read_text()
        except OSError:     # it has ended
            continue
        out += [int(part.split("Shared_Clean:")[1].split()[0]) for part in maps.split(str(image))[1:]]
    return out


async def test_two_guests_share_the_pages_of_a_disk(tree: Path, image: Path) -> None:
    volume = DiskImage(image, readonly=True, device="pmem")
    digest = hashlib.md5((tree / "big").read_bytes()).hexdigest()
    async with sandbox(volume) as one, sandbox(volume) as two:
        for each in (one, two):
            done = await each.run(BUSYBOX, ["sh", "-c", SHOW])
            mount, before, found, after = done.stdout.splitlines()
            assert mount.startswith("/dev/pmem0 /v ext4 ro,nosuid,nodev")
            assert "dax=always" in mount
            assert found.split()[0] == digest
            assert int(after.split()[1]) - int(before.split()[1]) < CONTENT // 2 >> 10, "the guest has no copy"
            assert "Read-only file system" in done.stderr
        first, second = shared_by_mappings(image)
        assert min(first, second) >= CONTENT >> 10


async def test_some_disks_beside_each_other(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (tmp_path / "small").mkdir()
    (tmp_path / "small/name").write_text("the other\n")
    await mkfs(tmp_path / "small", other, "4M")
    volumes = {"/v": DiskImage(image, readonly=True, device="pmem"), "/w": DiskImage(other, readonly=True),
               "/x": DiskImage(other, readonly=True, device="pmem")}  # fmt: skip
    async with Sandbox(QEMU(machine="q35"), isolation="emulated", template="off", volumes=volumes) as sb:
        done = await sb.run(BUSYBOX, ["sh", "-c", "cat /w/name /x/name; ls /v"], check=True)
    assert done.stdout == "the other\nthe other\nbig\nlost+found\n"


async def small_blocks(image: Path) -> None:
    await mkfs(image.parent / "tree", image, "32M", 1024)


async def another_kind(image: Path) -> None:
    # A superblock's magic, version and bytes in use (linux/fs/squashfs/squashfs_fs.h).
    await anyio.Path(image).write_bytes(struct.pack("<4s24xHH8xQ", b"hsqs", 4, 0, 2 << 20).ljust(2 << 20, b"\0"))


@pytest.mark.parametrize(("change", "why"), [
    (small_blocks, "has blocks of 1024 bytes, and device='pmem' maps pages of 4096"),
    (another_kind, "is a squashfs, of which nothing can be mapped"),
])  # fmt: skip
async def test_what_cant_be_mapped(image: Path, change: Callable[[Path], Awaitable[None]], why: str) -> None:
    await change(image)
    with pytest.raises(ConfigError, match=why):
        async with sandbox(DiskImage(image, readonly=True, device="pmem")):
            pass


async def test_a_machine_without_a_place_for_it(image: Path) -> None:
    with pytest.raises(ConfigError, match=r"microvm has no place for device='pmem' \(QEMU\(machine='q35'\) has"):
        async with sandbox(DiskImage(image, readonly=True, device="pmem"), "microvm"):
            pass


async def test_a_file_that_only_root_may_read(image: Path) -> None:
    os.chmod(image, 0o600)
    with pytest.raises(NotPermittedError, match=f"may not read {image} .chmod o.r"):
        async with sandbox(DiskImage(image, readonly=True, device="pmem")):
            pass
