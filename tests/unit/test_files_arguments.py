"""What the operations on files refuse before the guest is asked, and what they say."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from pykata import ConfigError, Container, FileError, FilePresentError, Files, Sandbox, SandboxClosedError
from pykata.files.failures import error
from pykata.testing import FakeFs, FakeHypervisor

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"
LARGE = 600 * 1024

Operation = Callable[[Files], Awaitable[Any]]


@pytest.fixture
async def box() -> AsyncIterator[Container]:
    async with Sandbox(FakeHypervisor(), FakeFs()) as sb, sb.container(BUSYBOX) as container:
        await container.files.write_bytes("/f", b"0123456789")
        await container.files.write_bytes("/large", bytes(LARGE))
        yield container


WRONG: dict[str, Operation] = {
    "chmod of text": lambda files: files.chmod("/f", "755"),  # type: ignore[arg-type]
    "chmod below 0": lambda files: files.chmod("/f", -1),
    "a mode that is too large": lambda files: files.mkdir("/d", 2**40),
    "mkdir of text": lambda files: files.mkdir("/d", mode="x"),  # type: ignore[arg-type]
    "touch": lambda files: files.touch("/t", mode=True),
    "a time": lambda files: files.touch("/t", mtime_ns=1.5),  # type: ignore[arg-type]
    "a time that is too late": lambda files: files.touch("/t", mtime_ns=2**63),
    "write": lambda files: files.write_bytes("/t", b"", mode=2**40),
    "chown by name": lambda files: files.chown("/f", "root"),  # type: ignore[arg-type]
    "chown of a bool": lambda files: files.chown("/f", gid=True),
    "truncate": lambda files: files.truncate("/f", "1"),  # type: ignore[arg-type]
    "list": lambda files: files.list("/", limit="x"),  # type: ignore[arg-type]
    "limit of a read": lambda files: files.read_bytes("/f", limit="x"),  # type: ignore[arg-type]
    "offset": lambda files: files.read_bytes("/f", offset=2**64),
    "size": lambda files: files.read_bytes("/f", size=2**63),
    "one owner": lambda files: files.upload("/", "/u", owner=(1,)),  # type: ignore[arg-type]
    "upload of nothing": lambda files: files.upload("", "/u"),
    "upload of bytes": lambda files: files.upload(b"/etc", "/u"),  # type: ignore[arg-type]
    "upload of NUL": lambda files: files.upload("\0", "/u"),
    "download to nothing": lambda files: files.download("/f", ""),
    "download to None": lambda files: files.download("/f", None),  # type: ignore[arg-type]
    "download of much": lambda files: files.download("/f", "/nowhere", max_size="1G"),  # type: ignore[arg-type]
    "download of many": lambda files: files.download("/f", "/nowhere", max_entries=-1),
    "a tar of many": lambda files: files.download_tar("/f", len, max_entries=True),
    "owners by name": lambda files: files.upload("/", "/u", owner=("a", "b")),  # type: ignore[arg-type]
}


async def test_changes_that_cannot_be(box: Container) -> None:
    for wrong in (
        lambda: box.changes(limit=-1), lambda: box.export_changes(""), lambda: box.export_changes("/t", max_size=-1)
    ):
        with pytest.raises(ConfigError):
            await wrong()


async def test_an_open_file_reads_a_number_of_bytes(box: Container) -> None:
    async with box.files.open("/f") as file:
        for wrong in (-2, "1", None):
            with pytest.raises(ConfigError, match="size="):
                await file.read(wrong)  # type: ignore[arg-type]
        assert await file.read() == b"0123456789"


@pytest.mark.parametrize("name", WRONG)
async def test_what_cannot_be(box: Container, name: str) -> None:
    with pytest.raises(ConfigError):
        await WRONG[name](box.files)
    assert await box.files.read_bytes("/f") == b"0123456789"


async def test_a_mode_as_stat_gives_it(box: Container) -> None:
    await box.files.chmod("/f", os.stat(__file__).st_mode)
    assert (await box.files.stat("/f")).mode == os.stat(__file__).st_mode & 0o7777


@pytest.mark.parametrize(("path", "size"), [("/f", 10), ("/large", LARGE)])
async def test_the_limit_of_a_read_holds_however_it_comes(box: Container, path: str, size: int) -> None:
    files = box.files
    assert len(await files.read_bytes(path, limit=size)) == size
    with pytest.raises(FileError, match="read into memory"):
        await files.read_bytes(path, limit=size - 1)
    with pytest.raises(FileError, match="read into memory"):
        await files.read_bytes(path, size=size, limit=3)
    assert len(await files.read_bytes(path, size=3, limit=3)) == 3
    assert len(await files.read_bytes(path, size=size + 1, limit=size)) == size
    assert len(await files.read_bytes(path, offset=size - 2, limit=2)) == 2


async def test_what_is_in_the_way_of_a_name(box: Container) -> None:
    await box.files.write_text("/g", "")
    with pytest.raises(FilePresentError, match="'/g'"):
        await box.files.rename("/f", "/g", replace=False)


def test_what_is_busy() -> None:
    assert "atomic=False" in error(16, "replace", b"/etc/hosts").hint
    assert "atomic=False" not in error(16, "remove", b"/proc").hint


@pytest.mark.parametrize("path", ["/f", "/large"])
@pytest.mark.parametrize("all_of_it", [False, True])
async def test_a_file_whose_block_was_left(box: Container, path: str, all_of_it: bool) -> None:
    async with box.files.open(path) as file:
        if all_of_it:
            await file.read(1)
    with pytest.raises(SandboxClosedError):
        await file.read()
    async with box.files.open("/new", "wb") as file:
        await file.write(b"x")
    with pytest.raises(SandboxClosedError):
        await file.write(b"y")
    assert await box.files.read_bytes("/new") == b"x"
    assert (await box.run(["echo", "after"])).stdout == "after\n"
