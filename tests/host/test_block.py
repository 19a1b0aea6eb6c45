# ruff: noqa: ASYNC240 - the loops of these tests have nothing else to do
"""Images as squashfs: everything is kept, made once, and nothing is left when it fails or nobody waits."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import anyio
import pytest

from pykata import host
from pykata.errors import (
    ConfigError,
    DiskFullError,
    HostError,
    ImageCorruptError,
    ToolFailedError,
    ToolMissingError,
)
from pykata.fs import kept
from pykata.fs.block import Block
from pykata.images import resolve
from pykata.spec import Disk, Image, ImageConfig, Mount
from tests.cancellation import Way, cancel_everywhere
from tests.images_fixtures import (
    CAPABILITY,
    Item,
    digest_of,
    file,
    folder,
    hardlink,
    layout_of,
    look,
    look_into,
    symlink,
    tar_of,
)

ITEMS = [
    folder("./", mode=0o711, uid=5, gid=6, mtime=77), folder("d", mode=0o2775, uid=1, gid=2, mtime=1),
    file("d/f", b"x" * 700_000, mode=0o6755, uid=2**31, gid=2**32 - 2, mtime=2,
         xattrs={"security.capability": CAPABILITY, "user.bytes": bytes(range(256)), "trusted.t": b"1"}),
    hardlink("d/l", "d/f"), Item("d/c", tarfile.CHRTYPE, device=(259, 300), mode=0o620),
    Item("d/b", tarfile.BLKTYPE, device=(8, 2**20 - 1)), Item("d/p", tarfile.FIFOTYPE, mode=0o600),
    symlink("d/s", "../" * 50 + "x", xattrs={"trusted.s": b"2"}), hardlink("d/t", "d/s"), hardlink("d/c2", "d/c"),
    file("n" * 255, b"n"), folder("caf\udce9"), file("caf\udce9/\udcff\udcfe", b"latin"),
    file("new\nline\\ \t'\"", b"odd"), file("empty"), hardlink("empty2", "empty"), folder("deep"),
    file("block", bytes(131072)), file("tail", b"z" * 131073), file("mostly", bytes(10**6) + b"end"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rootfs"


def image_of(write_tar: Callable[[IO[bytes]], None] | bytes, digest: str = "sha256:" + "0" * 64) -> Image:
    def write(dest: IO[bytes]) -> None:
        assert isinstance(write_tar, bytes)
        dest.write(write_tar)

    return Image("test", digest, ImageConfig(), "x86_64", write if isinstance(write_tar, bytes) else write_tar)


async def convert(image: Image, block: Block | None = None) -> Path:
    async with (block or Block()).rootfs(image, Path("/nowhere")) as attachment:
        [disk] = attachment.devices
        assert isinstance(disk, Disk)
        assert disk.readonly
        assert attachment.mounts == (Mount(disk.tag, "squashfs", options=("ro",)),)
        return disk.path


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


@contextmanager
def tool(directory: Path, script: str, name: str = "tar2sqfs") -> Iterator[None]:
    """A program of our own in the place of ``name``."""
    directory.mkdir(exist_ok=True)
    program = directory / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        yield


# --- what is made ---


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
async def test_everything_of_an_image_is_kept(tmp_path: Path, compression: str) -> None:
    tar = tar_of(ITEMS)
    layout_of(tmp_path / "l", [tar])
    image = await resolve(f"oci:{tmp_path}/l", architecture="x86_64")
    block = Block(compression=compression)  # type: ignore[arg-type]
    path = await convert(image, block)
    assert await asyncio.to_thread(look_into, path) == look(tar, whole=False)


@pytest.mark.parametrize("tar", [tar_of([]), b"", tar_of([folder("only")])])
async def test_an_image_of_nothing(tar: bytes) -> None:
    found = await asyncio.to_thread(look_into, await convert(image_of(tar)))
    assert set(found) <= {"", "only"}


async def test_times_that_squashfs_can_t_have_are_cut() -> None:
    tar = tar_of([file("old", mtime=-5), file("far", mtime=2**40)])
    found = await asyncio.to_thread(look_into, await convert(image_of(tar)))
    assert (found["old"].mtime, found["far"].mtime) == (0, 2**32 - 1)


async def test_access_control_lists_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    tar = tar_of([file("a", xattrs={"system.posix_acl_access": b"\2\0\0\0", "user.u": b"1"})])
    found = await asyncio.to_thread(look_into, await convert(image_of(tar)))
    assert found["a"].xattrs == (("user.u", b"1"),)
    assert "1 access control lists of the image are left out" in caplog.text


async def test_the_same_image_gives_the_same_bytes(tmp_path: Path) -> None:
    layout_of(tmp_path / "l", [tar_of(ITEMS)])
    image = await resolve(f"oci:{tmp_path}/l", architecture="x86_64")
    first = (await convert(image)).read_bytes()
    (await convert(image)).unlink()
    assert (await convert(image)).read_bytes() == first


async def test_a_disk_is_attached_as_it_is(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "d").touch()
    image = Image("builtin:x", "sha256:0", ImageConfig(), "x86_64", disk=tmp_path / "d", disk_type="erofs")
    async with Block().rootfs(image, tmp_path) as attachment:
        (disk,) = attachment.devices
        assert isinstance(disk, Disk)
        assert disk.descriptor is not None
        assert disk == Disk("rootfs", tmp_path / "d", descriptor=disk.descriptor)
        assert os.path.samestat(os.fstat(disk.descriptor), (tmp_path / "d").stat())
        assert attachment.mounts == (Mount("rootfs", "erofs", options=("ro",)),)
    assert not cache.exists()


def test_a_compression_that_there_isn_t() -> None:
    with pytest.raises(ConfigError, match=r"compression='none' is none of lz4, zstd"):
        Block(compression="none")  # type: ignore[arg-type]


# --- once ---


async def test_it_is_made_once(cache: Path) -> None:
    path = await convert(image_of(tar_of(ITEMS)))
    assert left(cache) == [path.name]
    os.utime(path, (1, 1))
    inode = path.stat().st_ino

    def never(dest: IO[bytes]) -> None:
        raise AssertionError

    assert await convert(image_of(never)) == path
    assert path.stat().st_ino == inode
    assert path.stat().st_mtime > time.time() - 1000     # the time of its last use


async def test_each_compression_has_its_own(cache: Path) -> None:
    assert await convert(image_of(tar_of(ITEMS))) != await convert(image_of(tar_of(ITEMS)), Block(compression="zstd"))


async def test_one_that_is_in_use_is_locked(cache: Path) -> None:
    import fcntl

    async with Block().rootfs(image_of(tar_of(ITEMS)), cache) as attachment:
        [disk] = attachment.devices
        assert isinstance(disk, Disk)
        descriptor = os.open(disk.path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


@pytest.mark.parametrize("damage", [b"", b"hsqs", b"x" * 4096])
async def test_one_that_isn_t_whole_is_made_again(damage: bytes) -> None:
    image = image_of(tar_of(ITEMS))
    path = await convert(image)
    good = path.read_bytes()
    path.write_bytes(damage or good[:-4096])
    assert (await convert(image)).read_bytes() == good


async def test_many_at_once_make_it_once(tmp_path: Path) -> None:
    calls: list[None] = []
    tar = tar_of(ITEMS)

    def write(dest: IO[bytes]) -> None:
        calls.append(None)
        dest.write(tar)

    image = image_of(write)
    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(convert, image)
    assert len(calls) == 1


OTHER_PROCESS = """
import asyncio, sys, pathlib
from pykata.fs.block import Block
from pykata.spec import Image, ImageConfig

def write(dest):
    tar = pathlib.Path(sys.argv[1]).read_bytes()
    dest.write(tar[:400_000])
    print("converting", flush=True)
    sys.stdin.readline()
    dest.write(tar[400_000:])

async def main():
    image = Image("test", "sha256:" + "0" * 64, ImageConfig(), "x86_64", write)
    async with Block().rootfs(image, pathlib.Path("/nowhere")):
        print("done", flush=True)

asyncio.run(main())
"""


@contextmanager
def other_process(tar: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that converts the same image; it waits for a line before it writes."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, tar], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "converting\n"
            while not any(name.endswith(".part") for name in left(host.cache_dir() / "rootfs")):
                assert process.poll() is None
                time.sleep(0.01)        # the tool makes its file when it has read 256 KiB
            yield process
        finally:
            process.kill()


def test_another_process_is_waited_for(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "tar").write_bytes(tar_of(ITEMS))

    def never(dest: IO[bytes]) -> None:
        raise AssertionError

    async def both(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        waiting = asyncio.ensure_future(convert(image_of(never)))
        await anyio.sleep(0.3)
        assert not waiting.done()
        process.stdin.write("\n")
        process.stdin.flush()
        assert (await waiting).exists()

    with other_process(tmp_path / "tar") as process:
        anyio.run(both, process)
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
    assert len(left(cache)) == 1


def test_waiting_for_another_process_can_be_cancelled(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "tar").write_bytes(tar_of(ITEMS))

    async def wait() -> None:
        with anyio.move_on_after(0.3) as scope:
            await convert(image_of(b""))
        assert scope.cancelled_caught

    with other_process(tmp_path / "tar") as process:
        anyio.run(wait)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
    assert len(left(cache)) == 1


def test_what_a_killed_process_left_is_collected(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "tar").write_bytes(tar_of(ITEMS))
    with other_process(tmp_path / "tar") as process:
        assert [Path(name).suffix for name in left(cache)] == [".lock", ".part"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert left(cache)[0].endswith(".lock")
    # The tool may have heard of the end before it was killed, and removed what it had.
    (cache / left(cache)[0]).with_suffix(".part").touch()
    # By another image's conversion, and by one of the same.
    path = anyio.run(convert, image_of(tar_of(ITEMS), "sha256:" + "1" * 64))
    assert left(cache) == [path.name]
    with other_process(tmp_path / "tar") as process:
        process.send_signal(signal.SIGKILL)
    anyio.run(convert, image_of(tar_of(ITEMS)))
    assert len(left(cache)) == 2


async def test_collecting_spares_what_is_being_made(tmp_path: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    for name in ("a.part", "b.lock", "c.squashfs", "d.part"):
        (cache / name).touch()
    async with host.locked(cache / "d.lock"):
        kept.collect(cache)
        assert left(cache) == ["c.squashfs", "d.lock", "d.part"]


# --- failures ---


async def test_a_damaged_image(tmp_path: Path, cache: Path) -> None:
    layout = layout_of(tmp_path / "l", [tar_of(ITEMS)], compression="plain")
    image = await resolve(f"oci:{tmp_path}/l", architecture="x86_64")
    blob = layout.path / "blobs" / digest_of(tar_of(ITEMS)).replace(":", "/")
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(ImageCorruptError) as caught:
        await convert(image)
    assert caught.value.digest == digest_of(tar_of(ITEMS))
    assert left(cache) == []


async def test_an_error_half_way_wins_over_what_the_tool_says(cache: Path) -> None:
    def write(dest: IO[bytes]) -> None:
        dest.write(tar_of(ITEMS)[:100_000])
        raise ImageCorruptError("half way")

    with pytest.raises(ImageCorruptError, match="half way"):
        await convert(image_of(write))
    assert left(cache) == []


async def test_no_tool(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("pykata.host.tools.EXTRA_PATH", ())
    with pytest.raises(ToolMissingError, match="apt-get install squashfs-tools-ng"):
        await convert(image_of(b""))
    assert left(cache) == []


@pytest.mark.parametrize(("script", "error", "why"), [
    ("echo first >&2; echo wrong >&2; exit 3", ToolFailedError, "tar2sqfs exited with code 3: wrong"),
    ("kill -9 $$", ToolFailedError, "was killed by SIGKILL"),
    ("head -c 100000 > /dev/null; echo wrong >&2; exit 1", ToolFailedError, "tar2sqfs exited with code 1: wrong"),
    ("cat > /dev/null; kill -SEGV $$", ToolFailedError, "was killed by SIGSEGV"),
    ("exit 0", ToolFailedError, "tar2sqfs exited with code 0"),
    ("cat > /dev/null", HostError, "is not a squashfs"),
    ("cat > /dev/null; for last; do :; done; head -c 200 /dev/zero > $last", HostError, "is not a squashfs"),
])
async def test_a_tool_that_fails(tmp_path: Path, cache: Path, script: str, error: type[HostError], why: str) -> None:
    tar = tar_of([*ITEMS, *(file(str(number), os.urandom(100_000)) for number in range(30))])
    with tool(tmp_path / "bin", script), pytest.raises(error) as caught:
        await convert(image_of(tar))
    assert why in str(caught.value)
    assert left(cache) == []


async def test_a_tool_that_fails_ends_an_image_that_writes_nothing_yet(tmp_path: Path, cache: Path) -> None:
    def write(dest: IO[bytes]) -> None:
        while True:
            dest.flush()

    with tool(tmp_path / "bin", "exit 4"), pytest.raises(ToolFailedError, match="exited with code 4"):
        await convert(image_of(write))
    assert left(cache) == []


async def test_what_the_tool_says_is_kept_to_its_end(tmp_path: Path) -> None:
    script = "yes noise | head -c 3000000 >&2; echo the end >&2; exit 1"
    with tool(tmp_path / "bin", script), pytest.raises(ToolFailedError) as caught:
        await convert(image_of(b""))
    assert caught.value.output.endswith("noise\nthe end\n")
    assert len(caught.value.output) <= host.TAIL


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can mount a small filesystem")
def test_a_full_disk(tmp_path: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", cache], check=True)
    try:
        tar = tar_of([file(str(number), os.urandom(100_000)) for number in range(30)])
        with pytest.raises(DiskFullError, match=str(cache)):
            anyio.run(convert, image_of(tar))
        assert left(cache) == []
        (cache / "fill").write_bytes(bytes(230_000))
        with pytest.raises(DiskFullError, match=str(cache)):
            anyio.run(convert, image_of(tar_of([file("a", os.urandom(100_000))])))
        assert left(cache) == ["fill"]
    finally:
        subprocess.run(["umount", cache], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can mount a filesystem without inodes")
def test_a_disk_without_inodes(tmp_path: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=2", "none", cache], check=True)
    try:
        with pytest.raises(DiskFullError, match=str(cache)):
            anyio.run(convert, image_of(tar_of(ITEMS)))
        assert left(cache) == []
    finally:
        subprocess.run(["umount", cache], check=True)


async def test_a_cache_that_can_t_be_written(cache: Path) -> None:
    cache.parent.mkdir()
    cache.touch()
    with pytest.raises(HostError, match=r"can't make|File exists"):
        await convert(image_of(tar_of(ITEMS)))
    cache.unlink()


# --- cancellation ---


async def test_cancelled_anywhere_nothing_is_left(tmp_path: Path, cache: Path) -> None:
    layout_of(tmp_path / "l", [tar_of(ITEMS)])
    image = await resolve(f"oci:{tmp_path}/l", architecture="x86_64")

    async def check(n: int, way: Way) -> None:
        assert [name for name in left(cache) if not name.endswith(".squashfs")] == []
        for name in left(cache):
            (cache / name).unlink()

    await cancel_everywhere(lambda: convert(image), check)
    assert len(left(cache)) == 1


@pytest.mark.parametrize("how", ["scope", "task"])
async def test_a_thread_that_is_stuck_in_a_write_is_freed(tmp_path: Path, cache: Path, how: str) -> None:
    stuck = asyncio.Event()
    loop = asyncio.get_running_loop()

    def write(dest: IO[bytes]) -> None:
        loop.call_soon_threadsafe(stuck.set)
        dest.write(bytes(10**9))

    with tool(tmp_path / "bin", "exec sleep 1000"):
        converting = asyncio.ensure_future(convert(image_of(write)))
        await stuck.wait()
        await anyio.sleep(0.2)
        if how == "task":
            converting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await converting
        else:
            with anyio.move_on_after(0):
                try:
                    await asyncio.wait([converting])
                finally:
                    converting.cancel()
            await asyncio.wait([converting])
    assert left(cache) == []
