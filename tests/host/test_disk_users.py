"""What of this machine uses a disk: real mounts and loop devices; of the device mapper what sysfs says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from pykata import DiskImage, VolumeInUseError
from pykata.fs.block import ready
from pykata.host import disk_users, is_one_filesystem, kinds_below, loop_of, mounts, where_written
from pykata.spec import Image, ImageConfig
from pykata.volumes.disk import disk


def run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as made:
        made.truncate(8 << 20)
    run("mkfs.ext4", "-q", path)
    return path


@contextmanager
def loop(of: Path) -> Iterator[Path]:
    device = Path(run("losetup", "--find", "--show", of))
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(device: Path, place: Path, options: str = "rw") -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    run("mount", "-o", options, device, place)
    try:
        yield place
    finally:
        run("umount", place)


def written(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return where_written(descriptor)
    finally:
        os.close(descriptor)


def image_of(path: Path, *, is_device: bool = False) -> Image:
    return Image("disk", "sha256:0", ImageConfig(), "x86_64", disk=path, disk_type="ext4", disk_is_device=is_device)


def taken(volume: DiskImage) -> None:
    """As a volume, for a moment."""

    async def take() -> None:
        async with disk("disk0", volume):
            pass

    anyio.run(take)


def refused(volume: DiskImage, why: str) -> None:
    with pytest.raises(VolumeInUseError, match=why):
        taken(volume)


def test_nobody_reads_what_this_machine_has_mounted_for_writing(file: Path, tmp_path: Path) -> None:
    with loop(file) as device, mounted(device, tmp_path / "a place") as place:
        for path in (device, file):
            why = f"the disk {path} is mounted for writing by this machine, at {place}"
            refused(DiskImage(path, readonly=True), why)
            with pytest.raises(VolumeInUseError, match=why), ready(image_of(path)):
                pass
        run("mount", "-o", "remount,ro", place)
        for path in (device, file):
            taken(DiskImage(path, readonly=True))
            with ready(image_of(path)):
                pass


def test_a_mount_that_is_read_only_of_what_is_not(file: Path, tmp_path: Path) -> None:
    with loop(file) as device, mounted(device, tmp_path / "written") as first, mounted(first, tmp_path / "b", "bind"):
        run("mount", "-o", "remount,bind,ro", tmp_path / "b")
        run("mount", "-o", "remount,bind,ro", first)
        assert written(device) == str(first)


def test_what_is_mounted_by_another_device(file: Path, tmp_path: Path) -> None:
    with loop(file) as below, loop(below) as device:
        assert written(below) == ""
        with mounted(device, tmp_path / "mnt") as place:
            assert [written(each) for each in (device, below, file)] == [str(place)] * 3


def test_nobody_writes_to_what_this_machine_has_made_a_device_of(file: Path) -> None:
    with loop(file) as device:
        refused(DiskImage(file), f"the disk {file} is in use by this machine, as {device}")
        taken(DiskImage(file, readonly=True))
    taken(DiskImage(file))


def test_holders_and_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume of the device mapper on a partition of a disk."""
    numbers = {"sda": "8:0", "sda1": "8:1", "dm-0": "253:0"}
    devices = tmp_path / "sys/dev/block"
    for folder, name in ((devices / "8:0/sda1", "sda1"), (devices / "8:1/holders/dm-0", "dm-0")):
        folder.mkdir(parents=True)
        (folder / "dev").write_text(f"{numbers[name]}\n")
    (devices / "8:0/sda1/partition").write_text("1\n")
    (tmp_path / "sys/block").mkdir()
    monkeypatch.setattr(disk_users, "SYS", tmp_path / "sys")
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    for options, place in (("rw,seclabel", "/my data"), ("ro", "")):
        line = f"36 27 253:0 / /my\\040data ro,relatime shared:1 - ext4 /dev/mapper/x {options}\n"
        (tmp_path / "mountinfo").write_text(line)
        assert disk_users.device_written(os.makedev(8, 0)) == place
        assert disk_users.device_written(os.makedev(253, 0)) == place
        assert disk_users.device_written(os.makedev(8, 2)) == ""


def test_no_loop_device(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    assert loop_of(descriptor) == where_written(descriptor) == ""
    os.close(descriptor)


def test_what_is_one_filesystem(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    (place / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    mount = f"36 27 {os.major(place.stat().st_dev)}:{os.minor(place.stat().st_dev)} / / rw shared:1 - "
    other = f"37 36 0:99 / {place}%s rw - tmpfs x rw\n"
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    for text, is_one in (
        (f"{mount}ext4 /dev/vda rw\n", True), (f"{mount}overlay overlay rw\n", False), ("", False),
        (f"{mount}ext4 /dev/vda rw\n{other % '/below/it'}", False), (f"{mount}ext4 /dev/vda rw\n{other % '-2'}", True),
    ):  # fmt: skip
        (tmp_path / "mountinfo").write_text(text)
        assert is_one_filesystem(place) is is_one
        assert is_one_filesystem(tmp_path / "link") is is_one


def test_what_kinds_of_filesystems_a_directory_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    device = place.stat().st_dev
    (tmp_path / "mountinfo").write_text(
        f"36 27 {os.major(device)}:{os.minor(device)} / / rw shared:1 - nfs4 server:/x rw\n"
        f"37 36 0:99 / {place}/below rw - fuse.sshfs x rw\n38 36 0:98 / {place}-2 rw - 9p x rw\n"
    )
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    assert kinds_below(place) == kinds_below(tmp_path / "link") == {"nfs4", "fuse.sshfs"}
