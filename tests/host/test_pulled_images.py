"""The images on this machine: listed, removed, kept below a limit, and shared by processes that may be killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

import pykata
from pykata import host
from pykata.errors import ConfigError, ImageInUseError, ImageNotFoundError, ImageReferenceError
from pykata.fs.block import Block
from pykata.images import resolve
from pykata.spec import Disk
from tests.http_server import Answer, Request, serving, through
from tests.images_fixtures import digest_of, file, layout_of, look_into, tar_of
from tests.real_registry import pulled, push, pushed, registry

pytestmark = pytest.mark.usefixtures("places")

SHARED = tar_of([file("base", random.Random(1).randbytes(500_000))])
TOP = tar_of([file("top", random.Random(2).randbytes(500_000))])


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry with two images that share a layer."""
    folder = tmp_path_factory.mktemp("registry")
    layout_of(folder / "one", [SHARED], compression="plain")
    layout_of(folder / "two", [SHARED, TOP], compression="zstd")
    layout_of(folder / "both", [SHARED, TOP], compression="plain")
    with registry(folder) as host:
        for name in ("one", "two", "both"):
            push(f"{folder / name}:latest", host, f"{name}:1")
        yield host


def files(places: Path) -> set[Path]:
    return {path for path in (places / "cache").rglob("*") if path.is_file()}


async def test_listing(upstream: str, places: Path) -> None:
    assert await pykata.list_images() == []
    await pykata.pull_image(f"{upstream}/one:1")
    await pykata.pull_image(f"{upstream}/both:1")
    both, one = await pykata.list_images()
    assert (both.name, one.name) == (f"{upstream}/both:1", f"{upstream}/one:1")
    assert both.architecture == "amd64"
    assert both.digest.startswith("sha256:")
    assert abs(both.used - time.time()) < 600
    assert 1_000_000 < one.size < 2_000_000 < both.size < 3_000_000
    await resolve(f"{upstream}/one:1", architecture="x86_64")
    assert [image.name for image in await pykata.list_images()] == [one.name, both.name]


async def test_removing(upstream: str, places: Path) -> None:
    await pykata.pull_image(f"{upstream}/one:1")
    alone = files(places)
    await pykata.pull_image(f"{upstream}/both:1")
    freed = await pykata.remove_image(f"{upstream}/both:1")
    assert 1_500_000 < freed < 2_000_000
    assert files(places) == alone
    await pykata.remove_image(f"{upstream}/one:1")
    assert files(places) == set()
    with pytest.raises(ImageNotFoundError, match=r"there is no image .*/one:1 here"):
        await pykata.remove_image(f"{upstream}/one:1")
    with pytest.raises(ImageReferenceError, match="is no image of a registry"):
        await pykata.remove_image("builtin:busybox")


async def test_removing_what_is_in_use(upstream: str) -> None:
    image = await pykata.pull_image(f"{upstream}/one:1")
    async with Block().rootfs(image, Path("/nowhere")):
        with pytest.raises(ImageInUseError, match="is in use"):
            await pykata.remove_image(f"{upstream}/one:1")
        assert len(await pykata.list_images()) == 1
    assert await pykata.remove_image(f"{upstream}/one:1") > 0


async def test_two_names_of_one_filesystem(upstream: str, tmp_path: Path) -> None:
    layout_of(tmp_path / "l", [SHARED], compression="plain")
    await pushed(tmp_path / "l", upstream, "one:again")
    await pykata.pull_image(f"{upstream}/one:1")
    await pykata.pull_image(f"{upstream}/one:again")
    await pykata.remove_image(f"{upstream}/one:again")
    assert (await pulled(f"{upstream}/one:1", pull="never"))[1] == {"base"}


# --- the limit ---


def old(path: Path, minutes: float) -> None:
    os.utime(path, (time.time() - 60 * minutes,) * 2)


async def test_what_was_used_least_recently_goes_first(
    upstream: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pykata.pull_image(f"{upstream}/one:1")
    for path in files(places):
        old(path, 30)
    await pykata.pull_image(f"{upstream}/two:1")
    two = {path for path in files(places) if path.stat().st_mtime > time.time() - 600}
    for path in two:
        old(path, 20)
    monkeypatch.setenv("PYKATA_CACHE_LIMIT", str(sum(path.stat().st_size for path in two)))
    assert {file.path for file in host.trim_cache()} & two == set()
    assert files(places) == two
    assert [image.name for image in await pykata.list_images()] == [f"{upstream}/two:1"]
    assert host.trim_cache() == []


async def test_gc_keeps_the_limit(upstream: str, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await pykata.pull_image(f"{upstream}/one:1")
    there = files(places)
    for path in there:
        old(path, 30)
    assert set(await pykata.collect_garbage()) & there == set()
    monkeypatch.setenv("PYKATA_CACHE_LIMIT", "0")
    assert set(await pykata.collect_garbage()) >= there
    assert files(places) == set()


async def test_what_is_used_stays(upstream: str, places: Path) -> None:
    image = await pykata.pull_image(f"{upstream}/one:1")
    for path in files(places):
        old(path, 30)
    async with Block().rootfs(image, Path("/nowhere")) as attachment:
        [disk] = attachment.devices
        assert isinstance(disk, Disk)
        old(disk.path, 30)
        host.trim_cache(0)
        assert files(places) == {disk.path}
    async with Block().rootfs(image, Path("/nowhere")):
        pass
    host.trim_cache(0)
    assert files(places) == {disk.path}         # it was used a moment ago
    old(disk.path, 30)
    host.trim_cache(0)
    assert files(places) == set()


async def test_pulling_trims(upstream: str, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await pykata.pull_image(f"{upstream}/one:1")
    for path in files(places):
        old(path, 30)
    monkeypatch.setenv("PYKATA_CACHE_LIMIT", "1")
    await pykata.pull_image(f"{upstream}/two:1")
    assert [image.name for image in await pykata.list_images()] == [f"{upstream}/two:1"]


def test_what_nobody_continues(places: Path) -> None:
    folder = places / "cache/images/blobs/sha256"
    folder.mkdir(parents=True)
    for name in ("new.part", "old.part", "old.lock", "older.new", "alone.lock"):
        (folder / name).touch()
    building = places / "cache/images/build-x"
    building.mkdir()
    (building / "packages.tar").touch()
    for path in (folder / "old.part", folder / "older.new", folder / "alone.lock", building):
        old(path, 60 * 25)
    host.trim_cache()
    assert files(places) == {folder / "new.part"}
    assert not building.exists()


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("20G", 20 * 1024**3), ("5 MiB", 5 * 1024**2), ("7k", 7 * 1024)])
def test_limits(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("PYKATA_CACHE_LIMIT", text)
    assert host.cache_limit() == size
    monkeypatch.setenv("PYKATA_CACHE_LIMIT", f"{text} apples")
    with pytest.raises(ConfigError, match="PYKATA_CACHE_LIMIT"):
        host.cache_limit()


# --- several processes ---

PULL = """
import asyncio, sys
import pykata
print("ready", flush=True)
sys.stdin.readline()
asyncio.run(pykata.pull_image(sys.argv[1], pull="missing"))
print("done", flush=True)
"""


def start(reference: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", PULL, reference], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def finished(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate()
    return out


async def test_two_processes_pull_an_image_once(upstream: str) -> None:
    async with serving(through(upstream, lambda request, answer: None)) as server:
        processes = [await anyio.to_thread.run_sync(start, f"{server.host}/both:1") for _ in range(2)]
        for process in processes:
            go(process)
        for process in processes:
            assert await anyio.to_thread.run_sync(finished, process) == "done\n"
        for layer in (SHARED, TOP):
            assert server.paths.count(f"/v2/both/blobs/{digest_of(layer)}") == 1


async def test_a_process_waits_for_a_layer_of_another_image(upstream: str) -> None:
    blob, entered, released = f"blobs/{digest_of(SHARED)}", anyio.Event(), anyio.Event()
    forward = through(upstream, lambda request, answer: None)

    async def held(request: Request) -> Answer:
        if request.path.endswith(blob) and not entered.is_set():
            entered.set()
            await released.wait()
        answer = forward(request)
        return answer if isinstance(answer, Answer) else await answer

    async with serving(held) as server:
        process = await anyio.to_thread.run_sync(start, f"{server.host}/both:1")
        go(process)
        await entered.wait()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pulled, f"{server.host}/one:1")
            await anyio.sleep(0.2)      # it asks for the same layer meanwhile, or not: the outcome is the same
            released.set()
        assert await anyio.to_thread.run_sync(finished, process) == "done\n"
        assert len([path for path in server.paths if path.endswith(blob)]) == 1


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.slow)])
async def test_killed_at_any_moment(upstream: str, places: Path, times: int) -> None:
    chance = random.Random(times)
    began = time.monotonic()
    process = await anyio.to_thread.run_sync(start, f"{upstream}/both:1")
    go(process)
    await anyio.to_thread.run_sync(finished, process)
    whole = time.monotonic() - began
    await pykata.remove_image(f"{upstream}/both:1")
    for _ in range(times):
        process = await anyio.to_thread.run_sync(start, f"{upstream}/both:1")
        go(process)
        await anyio.sleep(chance.uniform(0, whole))
        process.send_signal(signal.SIGKILL)
        await anyio.to_thread.run_sync(finished, process)
        await anyio.to_thread.run_sync(check, places)
        if chance.random() < 0.5:       # else the next one goes on from what this one left
            assert (await pulled(f"{upstream}/both:1"))[1] == {"base", "top"}
            await pykata.remove_image(f"{upstream}/both:1")
    assert (await pulled(f"{upstream}/both:1"))[1] == {"base", "top"}
    await anyio.to_thread.run_sync(check, places)
    assert not [path for path in files(places) if path.suffix in (".part", ".lock", ".new")]


def check(places: Path) -> None:
    """Whatever has its final name is whole."""
    for path in files(places):
        if path.suffix == "" and path.parent.name == "sha256":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        elif path.suffix == ".squashfs":
            assert set(look_into(path)) == {"", "base", "top"}
        else:
            assert path.suffix in (".json", ".part", ".lock", ".new")
