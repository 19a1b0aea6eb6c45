"""qcow2 images, made by qemu-img: what is read of them, and which are refused before QEMU sees them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata import ConfigError, DiskImage, ImageUnsupportedError, Sandbox
from pykata.hypervisors.qemu.command import image_node
from pykata.images.disk import read_head
from pykata.images.qcow2 import Qcow2Error, open_qcow2
from pykata.images.resolve import resolve
from pykata.images.superblock import HEAD
from pykata.spec import Disk
from pykata.testing import FakeFs, FakeHypervisor
from pykata.volumes import check_volumes

SIZE = 16 * 1024 * 1024


def run(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, capture_output=True)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 whose first KiB isn't zeros, either: a boot loader's place."""
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    run("mkfs.ext4", "-q", "-F", path)
    with path.open("r+b") as file:
        file.write(os.urandom(1024))
    return path


def converted(raw: Path, to: Path, *options: str) -> Path:
    run("qemu-img", "convert", "-O", "qcow2", *options, raw, to)
    return to


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("options", [
    (), ("-o", "compat=0.10"), ("-c",), ("-c", "-o", "compression_type=zstd"), ("-o", "cluster_size=512"),
    ("-c", "-o", "cluster_size=512"), ("-o", "cluster_size=2M"), ("-c", "-o", "cluster_size=2M"),
    ("-o", "preallocation=metadata"), ("-o", "lazy_refcounts=on"),
])  # fmt: skip
def test_the_disk_in_the_image_is_read(raw: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    with opened(converted(raw, tmp_path / "d", *options)) as descriptor:
        assert read_head(descriptor, "qcow2") == (raw.read_bytes()[:HEAD], SIZE)


def test_what_was_never_written_is_zeros(tmp_path: Path) -> None:
    run("qemu-img", "create", "-f", "qcow2", tmp_path / "d", "1G")
    with opened(tmp_path / "d") as descriptor:
        assert read_head(descriptor, "qcow2") == (bytes(HEAD), 1 << 30)
    run("qemu-img", "create", "-f", "qcow2", tmp_path / "d", "1K")
    with opened(tmp_path / "d") as descriptor:
        assert read_head(descriptor, "qcow2") == (bytes(1024), 1024)


@pytest.fixture
def refused(raw: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path: Path = tmp_path / "d"
    if request.param == "backing":
        run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", raw, path)
    elif request.param == "data":
        converted(raw, path, "-o", f"data_file={tmp_path}/other")
    elif request.param == "extended":
        converted(raw, path, "-o", "extended_l2=on")
    else:
        at, value = {
            "version": (7, 4),
            "encrypted": (35, 2),
            "corrupt": (79, 2),
            "unknown": (79, 0x40),
            "clusters": (23, 30),
            "compression": (79, 8),
            "raw": (0, 0),
        }[request.param]
        data = bytearray(converted(raw, path).read_bytes())
        data[at] = value
        if request.param == "compression":
            data[104] = 7
        path.write_bytes(data)
    return path


REFUSED = pytest.mark.parametrize(("refused", "said"), [
    ("backing", r"written over another file of this host.*qemu-img convert"),
    ("data", r"data is in another file of this host.*qemu-img convert"),
    ("extended", r"extended_l2=on.*, which aren't supported .qemu-img convert"), ("encrypted", "is encrypted"),
    ("version", "of version 4"), ("corrupt", r"marked as damaged .qemu-img check"), ("unknown", "needs features 0x40"),
    ("clusters", r"clusters have 2\^30 bytes"), ("compression", "a way that isn't known: 7"), ("raw", "it is no qcow2"),
], indirect=["refused"])  # fmt: skip


@REFUSED
async def test_what_is_refused(refused: Path, said: str) -> None:
    with opened(refused) as descriptor, pytest.raises(Qcow2Error):
        open_qcow2(descriptor)
    with pytest.raises(ImageUnsupportedError, match=f"{refused} can't be used: .*{said}"):
        await resolve(f"qcow2:{refused}", architecture="x86_64")
    from pykata.volumes.disk import disk

    with pytest.raises(ConfigError, match=f"the volume {refused} can't be used: .*{said}"):
        async with disk("d", DiskImage(refused, format="qcow2")):
            pass


@pytest.fixture
def disguised(raw: Path, tmp_path: Path) -> Path:
    """A raw disk whose guest wrote a qcow2's header into the first KiB, which ext4 leaves to it."""
    path = tmp_path / "disguised"
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", path)
    path.write_bytes(path.read_bytes()[:1024] + raw.read_bytes()[1024:])
    return path


@pytest.fixture
def qcow2(raw: Path, tmp_path: Path) -> Path:
    return converted(raw, tmp_path / "qcow2")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    run("qemu-img", "create", "-f", "qcow2", tmp_path / "empty", "1G")
    return tmp_path / "empty"


async def test_a_raw_disk_is_never_taken_for_a_qcow2(disguised: Path, qcow2: Path) -> None:
    path = disguised
    image = await resolve(f"disk:{path}", architecture="x86_64")
    assert (image.disk_type, image.disk_format) == ("ext4", "raw")
    from pykata.volumes.disk import disk

    async with disk("d", DiskImage(path)) as attachment:
        (device,) = attachment.devices
        assert isinstance(device, Disk)
        assert device.descriptor is not None
        assert device == Disk("d", path, "raw", readonly=False, descriptor=device.descriptor)
        assert os.path.samestat(os.fstat(device.descriptor), path.stat())
    # And a qcow2 isn't found to be one by looking at it.
    path = qcow2
    with pytest.raises(ImageUnsupportedError, match=r"is qcow2 \(qcow2:FILE says that it is one"):
        await resolve(f"disk:{path}", architecture="x86_64")
    with pytest.raises(ConfigError, match=r"no filesystem that we know \(is it a qcow2\? format='qcow2' says so"):
        async with disk("d", DiskImage(path)):
            pass


async def test_qcow2_as_an_image(qcow2: Path, empty: Path) -> None:
    path = qcow2
    image = await resolve(f"qcow2:{path}", architecture="x86_64")
    assert (image.disk, image.disk_type, image.disk_format) == (path, "ext4", "qcow2")
    with pytest.raises(ImageUnsupportedError, match=r"no filesystem that we know \(a disk is an ext4"):
        await resolve(f"qcow2:{empty}", architecture="x86_64")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2].replace(b"\x53\xef", b"\x53\xee"))
    with pytest.raises(ImageUnsupportedError, match="no filesystem"):
        await resolve(f"qcow2:{path}", architecture="x86_64")


def test_what_qemu_is_told() -> None:
    node = image_node("n", 7, Disk("d", Path("/d"), "qcow2", readonly=False))
    assert (node["driver"], node["backing"]) == ("qcow2", None), "it opens no file that the image names"
    assert node["file"] == {"driver": "file", "filename": "/dev/fdset/7", "read-only": False, "locking": "off",
                            "aio": "threads"}  # fmt: skip
    assert "backing" not in image_node("n", 7, Disk("d", Path("/d")))
    device = image_node("n", 7, Disk("d", Path("/d"), "qcow2", is_device=True))["file"]
    assert isinstance(device, dict)
    assert device["driver"] == "host_device"


def test_only_raw_disks_are_made(tmp_path: Path) -> None:
    volume = DiskImage(tmp_path / "none", size="8M", format="qcow2")
    with pytest.raises(ConfigError, match=r"there is no '.*none' \(only raw disks are made"):
        check_volumes({"/d": volume})
    with pytest.raises(ConfigError, match="format='vmdk' is unknown"):
        Sandbox(FakeHypervisor(), FakeFs(), volumes={"/d": DiskImage("x", format="vmdk")})  # type: ignore[arg-type]


@given(st.data())
def test_whatever_is_in_the_header_it_is_read_or_refused(data: st.DataObject) -> None:
    head = bytearray(os.urandom(8192))
    head[:24] = b"QFI\xfb" + bytes([0, 0, 0, data.draw(st.sampled_from([2, 3]))]) + bytes(15) + b"\x09"
    head[32:36] = bytes(4)
    if data.draw(st.booleans()):
        head[40:48] = data.draw(st.integers(0, 16)).to_bytes(8, "big")[1:] + b"\0"
    head[72:80] = data.draw(st.sampled_from([0, 1, 8, 4])).to_bytes(8, "big")
    descriptor = os.memfd_create("qcow2")
    try:
        os.write(descriptor, head)
        try:
            found, size = read_head(descriptor, "qcow2")
        except (Qcow2Error, OSError):
            return
        assert len(found) == min(HEAD, size)
    finally:
        os.close(descriptor)
