"""Archives from pipes and compressed ones, images of a running daemon, disk images that are used as they are."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import struct
import tarfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from pykata.errors import ImageCorruptError, ImageError, ImageNotFoundError, ImageUnsupportedError
from pykata.images import resolve
from pykata.images.config import chain_id
from pykata.images.limits import Limits
from pykata.spec import Image
from tests.images_fixtures import config_of, digest_of, file, layout_of, look, tar_of

pytestmark = pytest.mark.usefixtures("places")

LAYER = tar_of([file("etc/a", b"a"), file("b", b"b")])
NAMES = {"", "etc", "etc/a", "b"}


async def find(reference: str, **more: Any) -> Image:
    return await resolve(reference, architecture="x86_64", **more)


async def names(image: Image) -> set[str]:
    out = io.BytesIO()
    assert image.write_tar is not None
    await anyio.to_thread.run_sync(image.write_tar, out)
    return set(look(out.getvalue()))


def oci_archive(tmp_path: Path) -> bytes:
    layout_of(tmp_path / "l", [LAYER])
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.add(tmp_path / "l", ".")
    return out.getvalue()


def docker_archive(*, name: str = "app:1", layer: bytes = LAYER) -> bytes:
    """What ``docker save`` writes."""
    config = json.dumps(config_of([layer])).encode()
    manifest = [{"Config": f"{digest_of(config)[7:]}.json", "RepoTags": [name], "Layers": ["1/layer.tar"]}]
    return tar_of([file(manifest[0]["Config"], config), file("1/layer.tar", layer),  # type: ignore[arg-type]
                   file("manifest.json", json.dumps(manifest).encode())])


# --- archives ---


@pytest.mark.parametrize("packed", [False, True])
async def test_archives(tmp_path: Path, packed: bool) -> None:
    for prefix, raw in (("oci-archive", oci_archive(tmp_path)), ("docker-archive", docker_archive())):
        path = tmp_path / f"{prefix}.tar"
        path.write_bytes(gzip.compress(raw) if packed else raw)
        for reference in (f"{prefix}:{path}", str(path)):
            image = await find(reference)
            assert image.digest == digest_of(LAYER)
            assert image.reference == reference
            assert await names(image) == NAMES


async def test_a_compressed_archive_is_uncompressed_once(tmp_path: Path, places: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(docker_archive()))
    await find(f"docker-archive:{path}")
    [kept] = (places / "cache/images/archives").iterdir()
    inode = kept.stat().st_ino
    await find(f"docker-archive:{path}")
    assert kept.stat().st_ino == inode
    kept.unlink()
    assert await names(await find(f"docker-archive:{path}")) == NAMES


@pytest.mark.parametrize("prefix", ["oci-archive:", "docker-archive:", ""])
async def test_a_pipe(tmp_path: Path, prefix: str) -> None:
    raw = docker_archive() if prefix.startswith("docker") else oci_archive(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[raw])
    writer.start()
    image = await find(f"{prefix}{pipe}")
    await anyio.to_thread.run_sync(writer.join)
    assert await names(image) == NAMES


async def test_a_pipe_that_nobody_writes_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with anyio.move_on_after(0.3) as scope:
        await find(f"docker-archive:{tmp_path}/pipe")
    assert scope.cancelled_caught
    # The thread that waits sees it within a moment, and closes the pipe.
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, closed, tmp_path / "pipe")


def closed(pipe: Path) -> None:
    while any(os.path.realpath(f"/proc/self/fd/{fd}") == str(pipe) for fd in os.listdir("/proc/self/fd")):
        threading.Event().wait(0.01)


async def test_archives_that_are_refused(tmp_path: Path, places: Path) -> None:
    bomb, cut = tmp_path / "bomb", tmp_path / "cut"
    bomb.write_bytes(gzip.compress(bytes(5_000_000)))
    cut.write_bytes(gzip.compress(docker_archive())[:-20])
    with pytest.raises(ImageCorruptError, match="has more than 1000000 bytes"):
        await find(f"docker-archive:{bomb}", limits=Limits(size=1_000_000))
    with pytest.raises(ImageCorruptError, match="can't be uncompressed: truncated gzip"):
        await find(f"docker-archive:{cut}")
    assert list((places / "cache/images/archives").iterdir()) == []
    with pytest.raises(ImageNotFoundError):
        await find(f"oci-archive:{tmp_path}/none")


# --- a daemon ---


@asynccontextmanager
async def daemon(path: Path, answers: dict[str, bytes]) -> AsyncIterator[list[str]]:
    """What Docker's socket would say; an answer is a body, or bytes that begin with ``HTTP/``."""
    asked: list[str] = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        target = head.split(" ")[1]
        asked.append(target)
        body = answers.get(target, b"HTTP/1.0 404 Not Found\r\n\r\n{}")
        if not body.startswith(b"HTTP/"):
            body = b"HTTP/1.0 200 OK\r\nContent-Type: x\r\n\r\n" + body
        writer.write(body)
        try:
            with suppress(ConnectionError):
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        finally:
            writer.transport.abort()

    server = await asyncio.start_unix_server(one, path)
    try:
        yield asked
    finally:
        server.close()


def inspected(**more: Any) -> bytes:
    return json.dumps({
        "Id": IDENTITY, "Os": "linux", "Architecture": "amd64", "RootFS": {"Layers": [digest_of(LAYER)]},
        "Config": {"Cmd": ["/bin/app"], "Env": ["A=b"]}, **more,
    }).encode()  # fmt: skip


IDENTITY = "sha256:" + "5" * 64


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/d.sock")
    return tmp_path / "d.sock"


async def test_an_image_of_a_daemon(docker: Path, places: Path) -> None:
    answers = {"/images/team/app:1/json": inspected(), f"/images/{IDENTITY}/get": docker_archive()}
    async with daemon(docker, answers) as asked:
        image = await find("docker-daemon:team/app:1")
        assert asked == ["/images/team/app:1/json"]
        assert image.digest == chain_id([digest_of(LAYER)])
        assert (image.config.cmd, image.config.env) == (("/bin/app",), {"A": "b"})
        assert await names(image) == NAMES
    assert list((places / "cache/images/archives").iterdir()) == []


@pytest.mark.parametrize(("answer", "error", "message"), [
    (b"HTTP/1.0 404 No\r\n\r\n", ImageNotFoundError, "has no image 'app'"),
    (b"HTTP/1.0 500 No\r\n\r\n", ImageError, "answers 500"),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{}", ImageCorruptError, "sends 2 bytes of app instead of 100"),
    (b"HTTP/1.0 nonsense\r\n\r\n", ImageError, "doesn't speak HTTP"),
    (b"", ImageCorruptError, "is not JSON"),
    (b"x" * 5_000_000, ImageCorruptError, "more than 4194304 bytes"),
    (inspected(Architecture="arm64"), ImageUnsupportedError, "it is for linux/arm64"),
    (inspected(Id="nonsense"), ImageCorruptError, "not a digest"),
])
async def test_a_daemon_that_says_something_else(
    docker: Path, answer: bytes, error: type[ImageError], message: str
) -> None:
    async with daemon(docker, {"/images/app/json": answer}):
        with pytest.raises(error, match=message):
            await find("docker-daemon:app")


async def test_a_daemon_that_saves_something_else(docker: Path) -> None:
    answers = {"/images/app/json": inspected(), f"/images/{IDENTITY}/get": docker_archive(layer=tar_of([]))}
    async with daemon(docker, answers):
        image = await find("docker-daemon:app")
        with pytest.raises(ImageCorruptError, match="saves other layers than it says"):
            await names(image)


async def test_no_daemon(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=r"can't talk to .*d\.sock: No such file"):
        await find("docker-daemon:app")
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(ImageError, match="is not a unix socket"):
        await find("docker-daemon:app")


# --- disks ---


def disk(path: Path, at: int, magic: bytes, size: int = 8192) -> str:
    raw = bytearray(size)
    raw[at:at + len(magic)] = magic
    path.write_bytes(raw)
    return f"disk:{path}"


def squashfs(version: int = 4, used: int = 8192) -> bytes:
    return struct.pack("<4s24xHH8xQ", b"hsqs", version, 0, used)


def erofs(bits: int = 12, blocks: int = 2, features: int = 3, devices: int = 0, directories: int = 0) -> bytes:
    return struct.pack("<I8xB23xI40xI2xHxxB", 0xE0F5E1E2, bits, blocks, features, devices, directories)


def ext4(blocks: int = 8, log: int = 0, features: int = 0x2C2, high: int = 0) -> bytes:
    return struct.pack("<4xI16xI28xH38xI236xI", blocks, log, 0xEF53, features, high)


@pytest.mark.parametrize(("at", "magic", "kind"), [
    (0, squashfs(), "squashfs"), (1024, erofs(), "erofs"), (1024, ext4(), "ext4"),
])
async def test_disks(tmp_path: Path, at: int, magic: bytes, kind: str) -> None:
    reference = disk(tmp_path / "d.img", at, magic)
    image = await find(reference)
    assert (image.disk, image.disk_type, image.config.cmd) == (tmp_path / "d.img", kind, ("/bin/sh",))
    before = image.digest
    assert (await find(reference)).digest == before
    (tmp_path / "d.img").write_bytes((tmp_path / "d.img").read_bytes() + bytes(4096))
    assert (await find(reference)).digest != before


@pytest.mark.parametrize(("at", "magic", "size", "message"), [
    (0, b"", 8192, "no filesystem that we know"), (0, b"QFI\xfb", 8192, "is qcow2"),
    (510, b"\x55\xaa", 8192, "a disk with partitions"), (0, b"hsqs", 5000, r"no multiple of 4096 \(truncate"),
    (0, b"", 10, "no filesystem that we know"), (0, squashfs(version=3), 8192, r"has version 3\.0"),
    (0, squashfs(used=9000), 8192, "squashfs that can't be mounted: it has 9000 bytes, and the file only 8192"),
    (1024, erofs(bits=16), 8192, r"blocks have 2\^16 bytes"), (1024, erofs(blocks=3), 8192, "has 12288 bytes"),
    (1024, erofs(features=0x81), 8192, "needs features 0x80"), (1024, erofs(devices=1), 8192, "on 1 further devices"),
    (1024, erofs(directories=1), 8192, "blocks of another size"), (1024, ext4(blocks=9), 8192, "has 9216 bytes"),
    (1024, ext4(high=1), 8192, "has 4398046519296 bytes"), (1024, ext4(log=7), 8192, r"blocks have 2\^17 bytes"),
    (1024, ext4(features=0x4), 8192, "was not unmounted"), (1024, ext4(features=0x8), 8192, "only a journal"),
])
async def test_what_is_no_disk(tmp_path: Path, at: int, magic: bytes, size: int, message: str) -> None:
    with pytest.raises(ImageUnsupportedError, match=message):
        await find(disk(tmp_path / "d.img", at, magic, size))
    with pytest.raises(ImageNotFoundError):
        await find(f"disk:{tmp_path}/none")
