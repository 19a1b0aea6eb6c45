"""The fake agent's files, by the operations of a real container's."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pykata import (
    ConfigError,
    Container,
    FileError,
    FileIsDirectoryError,
    FileMissingError,
    FileNotDirectoryError,
    FilePresentError,
    Sandbox,
    SandboxClosedError,
)
from pykata.testing import FakeFs, FakeHypervisor, fake_bundle
from tests.cancellation import Way, cancel_everywhere

BUSYBOX = "builtin:busybox"


@asynccontextmanager
async def boxed(tmp_path: Path) -> AsyncIterator[Container]:
    with fake_bundle(tmp_path):
        async with Sandbox(FakeHypervisor(), FakeFs()) as sb, sb.container(BUSYBOX) as container:
            yield container


async def test_contents(tmp_path: Path) -> None:
    async with boxed(tmp_path) as box:
        files = box.files
        assert await files.write_text("/a/b/f", "héllo", parents=True, mode=0o600) == 6
        assert await files.read_text("/a/b/f") == "héllo"
        assert (await files.stat("/a/b/f")).mode == 0o600
        big = bytes(range(256)) * 12_000
        await files.write_bytes("/tmp/big", big)
        assert await files.read_bytes("/tmp/big") == big
        assert await files.read_bytes("/tmp/big", offset=256, size=3) == b"\0\1\2"
        async with files.open("/tmp/big", "ab") as file:
            await file.write(b"end")
        async with files.open("/tmp/big", "r+b", offset=2) as file:
            await file.write(b"XY")
        async with files.open("/tmp/big", offset=len(big) - 1) as file:
            assert await file.read() == b"\xffend"
        assert await files.read_bytes("/tmp/big", size=5) == b"\0\1XY\4"
        with pytest.raises(FilePresentError):
            async with files.open("/tmp/big", "xb"):
                pass


async def test_names(tmp_path: Path) -> None:
    async with boxed(tmp_path) as box:
        files = box.files
        await files.mkdir("/d/e", parents=True)
        await files.mkdir("/d/e", exist_ok=True)
        await files.write_text("/d/e/f", "x")
        await files.symlink("/l", "d/e")
        assert await files.read_text("/l/f") == "x"
        assert await files.readlink("/l") == "d/e"
        await files.rename("/l/f", "/d/g")
        assert [entry.name for entry in await files.list("/d")] == ["e", "g"]
        assert [str(path) async for path, _, _ in files.walk("/d")] == ["/d", "/d/e"]
        with pytest.raises(FileError) as full:
            await files.remove("/d")
        assert full.value.errno == errno.ENOTEMPTY
        await files.remove("/d", recursive=True)
        await files.remove("/d", missing_ok=True)
        assert [await files.exists(path) for path in ("/l", "/tmp", "/", "/d")] == [False, True, True, False]


async def test_attributes(tmp_path: Path) -> None:
    async with boxed(tmp_path) as box:
        await box.files.touch("/f", mtime_ns=5)
        await box.files.chmod("/f", 0o4711)
        await box.files.chown("/f", 1, 2)
        await box.files.truncate("/f", 10)
        found = await box.files.stat("/f")
        assert (found.mode, found.uid, found.gid, found.size, found.mtime_ns) == (0o4711, 1, 2, 10, 5)


async def test_errors(tmp_path: Path) -> None:
    async with boxed(tmp_path) as box:
        await box.files.write_text("/f", "")
        await box.files.symlink("/loop", "loop")
        kinds = {"/none": FileMissingError, "/tmp": FileIsDirectoryError, "/f/x": FileNotDirectoryError}
        for wrong, kind in kinds.items():
            with pytest.raises(kind):
                await box.files.read_bytes(wrong)
        with pytest.raises(FileError) as loop:
            await box.files.read_bytes("/loop")
        assert loop.value.errno == errno.ELOOP
        for path in ("", "a\0b", 3, b"bytes", "\ud800"):
            with pytest.raises(ConfigError):
                await box.files.read_bytes(path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "w"}, {"offset": -1}, {"mode": "wb", "offset": 1}, {"mode": "ab", "size": 1}, {"permissions": "x"}],
)
async def test_ways_to_open_that_cannot_be(tmp_path: Path, wrong: dict[str, object]) -> None:
    async with boxed(tmp_path) as box:
        with pytest.raises(ConfigError):
            box.files.open("/f", **wrong)  # type: ignore[arg-type]


async def test_users(tmp_path: Path) -> None:
    async with boxed(tmp_path) as box:
        assert box.files.as_user("app") is box.files.as_user("app")
        assert box.files.as_user("app").as_user("app") is not box.files
        await box.files.as_user("app").write_text("/f", "x")
        assert await box.files.read_text("/f") == "x"


async def test_a_container_that_was_left(tmp_path: Path) -> None:
    with fake_bundle(tmp_path):
        async with Sandbox(FakeHypervisor(), FakeFs()) as sb:
            async with sb.container(BUSYBOX) as box:
                await box.files.write_text("/f", "x")
            with pytest.raises(SandboxClosedError):
                await box.files.read_text("/f")
            with pytest.raises(SandboxClosedError):
                await box.changes()


async def test_cancelled_anywhere(tmp_path: Path) -> None:
    old, new = b"old" * 300_000, b"new" * 300_000
    async with boxed(tmp_path) as box:
        await box.files.write_bytes("/f", old)

        async def work() -> None:
            assert await box.files.read_bytes("/f") in (old, new)
            await box.files.write_bytes("/f", new)
            await box.files.list("/")

        async def afterwards(n: int, way: Way) -> None:
            assert await box.files.read_bytes("/f") in (old, new)

        assert await cancel_everywhere(work, afterwards, step=3) > 10
