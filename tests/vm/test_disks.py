"""Disks of this machine in a guest: raw and qcow2, files and block devices, as root filesystems and as volumes."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from pykata import DiskImage, Sandbox, VolumeInUseError

BUSYBOX = "builtin:busybox"


def run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@asynccontextmanager
async def mounted(device: Path, place: Path) -> AsyncIterator[None]:
    await anyio.run_process(["mount", "--mkdir", device, place])
    try:
        yield
    finally:
        await anyio.run_process(["umount", place])


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


def sandbox(**options: Any) -> Sandbox:
    return Sandbox(isolation="emulated", template="off", **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root filesystem on a raw ext4."""
    tree = tmp_path_factory.mktemp("disks") / "tree"
    busybox = shutil.which("busybox")
    assert busybox is not None
    for name in ("bin", "etc", "tmp"):
        (tree / name).mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    for applet in ("sh", "cat", "echo", "mount", "dd"):
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc/what").write_text("the disk\n")
    path = tree.parent / "root.raw"
    run("mkfs.ext4", "-q", "-d", tree, path, "16M")
    return path


@pytest.fixture
def qcow2(root: Path, tmp_path: Path) -> Path:
    run("qemu-img", "convert", "-O", "qcow2", "-c", root, tmp_path / "root.qcow2")
    return tmp_path / "root.qcow2"


@pytest.fixture
def loop(root: Path, tmp_path: Path) -> Iterator[Path]:
    """A loop device with a copy of it."""
    shutil.copy(root, tmp_path / "copy")
    device = run("losetup", "--find", "--show", tmp_path / "copy")
    yield Path(device)
    run("losetup", "--detach", device)


@pytest.fixture
def mapped(root: Path, tmp_path: Path) -> Iterator[Path]:
    """The same through a second loop device: what the host makes of a device is one, too."""
    run("qemu-img", "convert", "-O", "qcow2", root, tmp_path / "inner")
    device = run("losetup", "--find", "--show", tmp_path / "inner")
    yield Path(device)
    run("losetup", "--detach", device)


async def test_qcow2_as_root_filesystem(qcow2: Path) -> None:
    before = await anyio.Path(qcow2).read_bytes()
    image = f"qcow2:{qcow2}"
    for fs in ("block", "virtiofs"):
        async with sandbox(fs=fs) as sb:
            done = await sb.run(image, sh("cat /etc/what; echo x > /etc/what; cat /etc/what"))
            assert (done.stdout, done.stderr) == ("the disk\nx\n", "")
            assert (await sb.run(image, ["cat", "/etc/what"])).stdout == "the disk\n"
    assert await anyio.Path(qcow2).read_bytes() == before


@pytest.mark.parametrize("how", ["io_uring", "threads"])
async def test_by_io_uring_and_threads(root: Path, tmp_path: Path, how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def choose(binary: Path) -> Any:
        asked.append(how)
        return how

    monkeypatch.setattr("pykata.hypervisors.qemu.aio.choose", choose)
    async with sandbox(volumes={"/v": DiskImage(tmp_path / "disk", size="8M")}) as sb:
        script = "dd if=/dev/zero of=/v/x bs=64k count=64 2>/dev/null; sync; md5sum < /v/x"
        assert (await sb.run(f"disk:{root}", ["sh", "-c", "cat /etc/what"], check=True)).stdout == "the disk\n"
        done = await sb.run(BUSYBOX, sh(script), check=True)
    assert done.stdout.split()[0] == hashlib.md5(bytes(4 << 20)).hexdigest()
    assert asked == [how]


async def test_a_block_device_as_root_filesystem(loop: Path, mapped: Path) -> None:
    async with sandbox() as sb:
        for image in (f"disk:{loop}", f"qcow2:{mapped}"):
            assert (await sb.run(image, ["cat", "/etc/what"], check=True)).stdout == "the disk\n"


async def test_qcow2_as_a_volume(qcow2: Path, tmp_path: Path) -> None:
    writer, reader = DiskImage(qcow2, format="qcow2"), DiskImage(qcow2, format="qcow2", readonly=True)
    async with sandbox(volumes={"/d": writer}) as sb:
        script = "cat /d/etc/what; echo more >> /d/etc/what; dd if=/dev/urandom of=/d/big bs=1M count=2 2>/dev/null"
        assert (await sb.run(BUSYBOX, sh(script), check=True)).stdout == "the disk\n"
        with pytest.raises(VolumeInUseError, match="is in use by another sandbox"):
            async with sandbox(volumes={"/d": reader}):
                pass
    async with sandbox(volumes={"/d": reader}) as one, sandbox(volumes={"/d": reader}) as two:
        for sb in (one, two):
            done = await sb.run(BUSYBOX, sh("cat /d/etc/what; echo x > /d/x"))
            assert done.stdout == "the disk\nmore\n"
            assert "Read-only file system" in done.stderr
            with pytest.raises(VolumeInUseError):
                async with sandbox(volumes={"/d": writer}):
                    pass


async def test_nobody_writes_to_an_image_that_is_used(root: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    shutil.copy(root, disk)
    async with sandbox() as sb, sb.container(f"disk:{disk}") as container:
        with pytest.raises(VolumeInUseError, match=f"the disk {disk} is in use by another sandbox"):
            async with sandbox(volumes={"/d": DiskImage(disk)}):
                pass
        assert (await container.run(["cat", "/etc/what"])).stdout == "the disk\n"
    # And not the other way round.
    with disk.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        async with sandbox() as sb:
            with pytest.raises(VolumeInUseError, match=f"the disk {disk} is in use by a sandbox that writes to it"):
                await sb.run(f"disk:{disk}", ["true"])


async def test_a_written_qcow2_is_whole(qcow2: Path) -> None:
    async with sandbox(volumes={"/d": DiskImage(qcow2, format="qcow2")}) as sb:
        await sb.run(BUSYBOX, sh("for i in $(seq 50); do echo $i > /d/$i; done"), check=True)
    # Nobody asked QEMU to close it: what was written out is there, and at most some space is lost.
    assert (await anyio.run_process(["qemu-img", "check", "-q", qcow2], check=False)).returncode in (0, 3)


async def test_a_fork_has_its_qcow2(qcow2: Path, tmp_path: Path) -> None:
    image = f"qcow2:{qcow2}"
    async with sandbox() as sb, sb.container(image) as container:
        await container.run(["cat", "/etc/what"], check=True)
        (fork,) = await sb.fork()
        await sb.snapshot(tmp_path / "saved")
        async with fork, Sandbox.restore(tmp_path / "saved", isolation="emulated") as restored:
            for each in (fork, restored):
                assert (await each.run(image, sh("cat /bin/busybox > /tmp/x; cat /etc/what"))).stdout == "the disk\n"


async def test_a_detached_sandbox_runs_a_qcow2(qcow2: Path) -> None:
    detached = await sandbox().detach("qcow2")
    try:
        async with Sandbox.connect("qcow2") as sb:
            assert (await sb.run(f"qcow2:{qcow2}", ["cat", "/etc/what"])).stdout == "the disk\n"
    finally:
        await detached.stop()


async def test_a_device_that_this_machine_has_mounted(loop: Path, tmp_path: Path) -> None:
    async with mounted(loop, tmp_path / "mnt"):
        with pytest.raises(VolumeInUseError, match=f"{loop} is in use, by this machine"):
            async with sandbox(volumes={"/d": DiskImage(loop)}):
                pass
    async with sandbox(volumes={"/d": DiskImage(loop)}) as sb:
        assert (await sb.run(BUSYBOX, sh("cat /d/etc/what; echo x > /d/x"), check=True)).stdout == "the disk\n"
        with pytest.raises(VolumeInUseError, match=f"{loop} is in use, by this machine or by another sandbox"):
            async with sandbox(volumes={"/d": DiskImage(loop)}):
                pass


@pytest.fixture
def pairs(root: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two disks, and beside each of them ("-other") one without the file."""
    for name in ("volume", "image"):
        for copy in (tmp_path / name, tmp_path / f"{name}-other"):
            shutil.copy(root, copy)
        run("debugfs", "-w", "-R", "rm /etc/what", tmp_path / f"{name}-other")
    return tmp_path / "volume", tmp_path / "image"


async def test_what_is_used_is_what_was_looked_at(pairs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes to have its name, when it has been found to be in order and before the machine has it."""
    volume, image = pairs
    displaced = []

    def looked_at(descriptor: int) -> str:
        path = next(each for each in pairs if each.samefile(f"/proc/self/fd/{descriptor}"))
        displaced.append(path)
        Path(f"{path}-other").replace(path)
        return ""

    monkeypatch.setattr("pykata.volumes.disk.where_written", looked_at)
    monkeypatch.setattr("pykata.host.where_written", looked_at)
    async with sandbox(volumes={"/d": DiskImage(volume)}) as sb:
        done = await sb.run(f"disk:{image}", sh("cat /etc/what /d/etc/what"))
    assert (done.stdout, done.stderr) == ("the disk\n" * 2, "")
    assert displaced == [volume, image]
