"""A registry behind a proxy that breaks, stalls, refuses and lies: what is continued, tried again, or ends."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from attrs import evolve

from pykata.errors import DiskFullError, ImageCorruptError, RateLimitedError, RegistryError, RegistryUnreachableError
from pykata.spec import PullEvent, Registries
from tests.cancellation import Way, cancel_everywhere
from tests.http_server import Answer, Request, serving, through
from tests.images_fixtures import digest_of, file, layout_of, tar_of
from tests.real_registry import pulled, push, registry
from tests.registry_fixtures import stored

pytestmark = pytest.mark.usefixtures("places")

LAYER = tar_of([file("data", random.Random(1).randbytes(3_000_000)), file("small", b"x")])
BLOB = f"/v2/app/blobs/{digest_of(LAYER)}"
IMPATIENT = Registries(timeout=20.0, retries=2)

Fault = Callable[[Request, Answer], Answer | None]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("registry")
    layout_of(folder / "l", [LAYER], compression="plain")
    with registry(folder) as host:
        push(f"{folder}/l:latest", host, "app:1")
        yield host


def on_blob(fault: Fault, times: int = 1000) -> Fault:
    """A fault of the layer's first ``times`` answers."""
    left = [times]

    def look(request: Request, answer: Answer) -> Answer | None:
        if request.path != BLOB or left[0] <= 0:
            return None
        left[0] -= 1
        return fault(request, answer)

    return look


def cut(request: Request, answer: Answer) -> Answer:
    return evolve(answer, length=len(answer.body), cut=len(answer.body) // 2)


async def test_a_connection_that_breaks_is_continued(upstream: str) -> None:
    events: list[PullEvent] = []
    async with serving(through(upstream, on_blob(cut, 3))) as server:
        _, names = await pulled(f"{server.host}/app:1", registries=IMPATIENT, progress=events.append)
    assert names == {"data", "small"}
    ranges = [int(value.removeprefix("bytes=").rstrip("-")) for value in server.seen("range")]
    assert ranges == sorted(ranges)
    assert len(ranges) == 3
    assert 1_400_000 < ranges[0] < ranges[1] < ranges[2]
    assert [event.status for event in events].count("retrying") == 3


async def test_a_registry_without_ranges(upstream: str) -> None:
    def whole(request: Request, answer: Answer) -> Answer | None:
        ranged = "range" in request.headers
        return evolve(answer, status=200, body=LAYER, headers={}) if ranged else cut(request, answer)

    async with serving(through(upstream, on_blob(whole))) as server:
        assert (await pulled(f"{server.host}/app:1", registries=IMPATIENT))[1] == {"data", "small"}


async def test_the_next_pull_continues(upstream: str, places: Path) -> None:
    async with serving(through(upstream, on_blob(cut))) as server:
        with pytest.raises(RegistryUnreachableError, match=r"the connection to 127\.0\.0\.1 broke"):
            await pulled(f"{server.host}/app:1", registries=Registries(retries=0))
    [part] = (places / "cache/images/blobs/sha256").glob("*.part")
    kept = part.stat().st_size
    assert kept > 1_000_000
    async with serving(through(upstream, on_blob(cut, 0))) as server:
        assert (await pulled(f"{server.host}/app:1", registries=IMPATIENT))[1] == {"data", "small"}
        assert server.seen("range") == [f"bytes={kept}-"]
    assert not part.exists()


async def test_what_was_left_is_wrong(upstream: str, places: Path) -> None:
    part = places / f"cache/images/blobs/{digest_of(LAYER).replace(':', '/')}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1_000_000))
    assert (await pulled(f"{upstream}/app:1"))[1] == {"data", "small"}
    assert not part.exists()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_refusals_that_pass(upstream: str, status: int) -> None:
    left = {"manifests": 2, "blobs": 2}

    def refuse(request: Request, answer: Answer) -> Answer | None:
        kind = request.path.split("/")[3] if request.path.count("/") > 3 else ""
        if left.get(kind, 0):
            left[kind] -= 1
            return Answer(b"{}", status, {"Retry-After": "0"})
        return None

    async with serving(through(upstream, refuse)) as server:
        assert (await pulled(f"{server.host}/app:1", registries=IMPATIENT))[1] == {"data", "small"}
    assert left == {"manifests": 0, "blobs": 0}


async def test_a_rate_limit(upstream: str) -> None:
    body = b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow \\u001b[31mdown"}]}'

    def refuse(request: Request, answer: Answer) -> Answer | None:
        return Answer(body, 429, {"Retry-After": "3600"}) if "manifests" in request.path else None

    async with serving(through(upstream, refuse)) as server:
        with pytest.raises(RateLimitedError, match=r"wants fewer requests: slow \\x1b\[31mdown") as caught:
            await pulled(f"{server.host}/app:1", registries=IMPATIENT)
        assert len([path for path in server.paths if "manifests" in path]) == 1
    assert caught.value.retry_after == 3600


async def test_a_failure_that_stays(upstream: str) -> None:
    def refuse(request: Request, answer: Answer) -> Answer | None:
        return Answer(b"oh no", 503) if "manifests" in request.path else None

    async with serving(through(upstream, refuse)) as server:
        with pytest.raises(RegistryError, match=r"127\.0\.0\.1 answers 503"):
            await pulled(f"{server.host}/app:1", registries=IMPATIENT)
        assert len([path for path in server.paths if "manifests" in path]) == 3


async def test_wrong_bytes(upstream: str, places: Path) -> None:
    def lie(request: Request, answer: Answer) -> Answer:
        return evolve(answer, body=answer.body[:-1] + bytes([answer.body[-1] ^ 1]))

    async with serving(through(upstream, on_blob(lie))) as server:
        with pytest.raises(ImageCorruptError, match=f"instead of {digest_of(LAYER)}") as caught:
            await pulled(f"{server.host}/app:1", registries=IMPATIENT)
    assert caught.value.digest == digest_of(LAYER)
    assert caught.value.reference == f"{server.host}/app:1"
    assert [path for path in (places / "cache").rglob("*") if path.is_file()] == []


async def test_more_bytes_than_there_are(upstream: str) -> None:
    def more(request: Request, answer: Answer) -> Answer:
        return evolve(answer, endless=True)

    async with serving(through(upstream, on_blob(more))) as server:
        with pytest.raises(ImageCorruptError, match=f"has more than {len(LAYER)} bytes"):
            await pulled(f"{server.host}/app:1", registries=IMPATIENT)


async def test_fewer_bytes_than_there_are(upstream: str) -> None:
    def less(request: Request, answer: Answer) -> Answer:
        return Answer(b"", 416) if "range" in request.headers else evolve(answer, body=answer.body[:1000])

    async with serving(through(upstream, on_blob(less))) as server:
        with pytest.raises(ImageCorruptError, match=f"has fewer bytes of app's blob {digest_of(LAYER)}"):
            await pulled(f"{server.host}/app:1", registries=IMPATIENT)


async def test_a_registry_that_stalls(upstream: str) -> None:
    def stall(request: Request, answer: Answer) -> Answer:
        return evolve(cut(request, answer), stall=True)

    async with serving(through(upstream, on_blob(stall))) as server:
        with pytest.raises(RegistryUnreachableError, match=r"127\.0\.0\.1 stopped answering for 5 s"):
            await pulled(f"{server.host}/app:1", registries=Registries(timeout=5.0, retries=0))


async def test_a_registry_that_stalls_before_it_answers() -> None:
    async def stall(request: Request) -> Answer:
        await anyio.sleep_forever()
        raise AssertionError

    async with serving(stall) as server:
        with pytest.raises(RegistryUnreachableError):
            await pulled(f"{server.host}/app:1", registries=Registries(timeout=2.0, retries=0))


@pytest.mark.parametrize("plainly", [True, False])
async def test_cancelling_a_pull_that_stalls(upstream: str, plainly: bool) -> None:
    stalled = anyio.Event()

    def stall(request: Request, answer: Answer) -> Answer:
        stalled.set()
        return evolve(cut(request, answer), stall=True)

    async with serving(through(upstream, on_blob(stall))) as server, anyio.create_task_group() as tasks:
        tasks.start_soon(pulled, f"{server.host}/app:1")
        await stalled.wait()
        if plainly:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


async def test_cancelled_anywhere(upstream: str, places: Path) -> None:
    cache = places / "cache"

    async def afterwards(n: int, way: Way) -> None:
        unfinished = [path for path in stored(places) if path.suffix in (".lock", ".new")]
        assert unfinished == [], f"at {n} ({way})"
        await anyio.to_thread.run_sync(partial(shutil.rmtree, cache, ignore_errors=True))

    # Steps that are prime to each other: together the two ways meet most of what there is.
    assert await cancel_everywhere(lambda: pulled(f"{upstream}/app:1"), afterwards, ways=("suspended",), step=3) > 10
    assert await cancel_everywhere(lambda: pulled(f"{upstream}/app:1"), afterwards, ways=("arriving",), step=2) > 10
    assert (await pulled(f"{upstream}/app:1"))[1] == {"data", "small"}


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can mount")
@pytest.mark.parametrize("size", ["1M", "5M"])
def test_a_full_disk(upstream: str, places: Path, size: str) -> None:
    cache = places / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", cache], check=True)
    try:
        with pytest.raises(DiskFullError, match="no space left for"):
            anyio.run(pulled, f"{upstream}/app:1")
        assert [path for path in stored(places) if path.suffix in (".squashfs", ".lock", ".new")] == []
    finally:
        subprocess.run(["umount", cache], check=True)
    assert anyio.run(pulled, f"{upstream}/app:1")[1] == {"data", "small"}


async def test_a_layer_that_is_damaged_on_disk(upstream: str, places: Path) -> None:
    for damage in (b"", bytes(len(LAYER))):
        await pulled(f"{upstream}/app:1")
        blob = places / "cache/images/blobs" / digest_of(LAYER).replace(":", "/")
        await anyio.to_thread.run_sync(blob.write_bytes, damage)
        shutil.rmtree(places / "cache/rootfs")
        events: list[PullEvent] = []
        assert (await pulled(f"{upstream}/app:1", progress=events.append))[1] == {"data", "small"}
        assert "downloaded" in {event.status for event in events}


@pytest.fixture
def in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may take as long as the wait for a byte of it: one that comes byte by byte comes to its end sooner."""
    for module in ("retry", "download"):
        monkeypatch.setattr(f"pykata.images.registry.{module}.PATIENCE", 1)


@pytest.mark.usefixtures("in_one")
async def test_a_registry_that_sends_a_byte_now_and_then() -> None:
    async with serving(lambda request: Answer(drip=True)) as server:
        with pytest.raises(RegistryUnreachableError, match=r"took more than 5 s"):
            await pulled(f"{server.host}/app:1", registries=Registries(timeout=5.0, retries=0))


@pytest.mark.usefixtures("in_one")
async def test_a_layer_that_comes_a_byte_now_and_then(upstream: str) -> None:
    async with serving(through(upstream, on_blob(lambda request, answer: Answer(drip=True)))) as server:
        with pytest.raises(RegistryUnreachableError, match=r"took more than 5 s"):
            await pulled(f"{server.host}/app:1", registries=Registries(timeout=5.0, retries=0))
