"""The files of a container, in a real guest."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import PurePosixPath

import anyio
import pytest

from pykata import (
    Container,
    FileDeniedError,
    FileError,
    FileIsDirectoryError,
    FileMissingError,
    FileNotDirectoryError,
    FilePresentError,
    Sandbox,
    SandboxClosedError,
)

BUSYBOX = "builtin:busybox"
MIB = 1024 * 1024


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


@pytest.fixture
async def box(sb: Sandbox) -> AsyncIterator[Container]:
    async with sb.container(BUSYBOX) as container:
        yield container


async def out(box: Container, script: str) -> str:
    return (await box.run(sh(script), check=True)).stdout


# --- contents ---


async def test_what_is_written_is_there(box: Container) -> None:
    data = bytes(range(256)) * 40
    assert await box.files.write_bytes("/tmp/data", data) == len(data)
    assert await box.files.read_bytes("/tmp/data") == data
    assert (await box.run(["cat", "/tmp/data"])).stdout_bytes == data
    await box.files.write_text(PurePosixPath("/tmp/text"), "héllo\r\n", mode=0o640)
    assert await box.files.read_text("/tmp/text") == "héllo\r\n"
    assert await out(box, "stat -c '%a %u' /tmp/text") == "640 0\n"
    assert await box.files.write_bytes("/tmp/empty", b"") == 0
    assert await box.files.read_bytes("/tmp/empty") == b""


async def test_parts(box: Container) -> None:
    await box.files.write_bytes("/f", b"0123456789")
    assert await box.files.read_bytes("/f", offset=3) == b"3456789"
    assert await box.files.read_bytes("/f", offset=3, size=4) == b"3456"
    assert await box.files.read_bytes("/f", offset=8, size=40) == b"89"
    assert await box.files.read_bytes("/f", offset=80) == b""
    assert await box.files.read_bytes("/f", size=0) == b""


async def test_large_contents_are_streamed(box: Container) -> None:
    data = os.urandom(5 * MIB + 1)
    await box.files.write_bytes("/big", data)
    assert await box.files.read_bytes("/big") == data
    assert await box.files.read_bytes("/big", offset=MIB, size=2 * MIB) == data[MIB : 3 * MIB]
    with pytest.raises(FileError, match="more than 1000 bytes") as caught:
        await box.files.read_bytes("/big", limit=1000)
    assert caught.value.errno == errno.EFBIG
    await box.files.write_bytes("/big", data[:MIB], atomic=False)
    assert (await box.files.stat("/big")).size == MIB


async def test_files_that_claim_to_be_empty(box: Container) -> None:
    assert "MemTotal" in await box.files.read_text("/proc/meminfo")
    async with box.files.open("/proc/meminfo") as file:
        assert b"MemTotal" in await file.read()
    assert await box.files.read_text("/etc/hostname") == "shared\n"


async def test_a_file_is_replaced_at_once_or_not_at_all(box: Container) -> None:
    await out(box, "echo old > /f; chmod 604 /f; chown 12:34 /f; ln -s f /link; ln /f /hard")
    await box.files.write_text("/link", "new")
    assert await out(box, "cat /f; stat -c ' %a %u %g' /f; readlink /link; cat /hard") == "new 604 12 34\nf\nold\n"
    await out(box, "echo >> /hard")
    await box.files.write_text("/hard", "in place", atomic=False)
    assert await out(box, "cat /hard; ls -A / | grep -c pykata || true") == "in place0\n"


async def test_a_stream_that_fails_changes_nothing(box: Container) -> None:
    await box.files.write_text("/f", "old")

    async def fail() -> None:
        async with box.files.open("/f", "wb") as file:
            await file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    with anyio.move_on_after(0.3):
        async with box.files.open("/new", "wb") as file:
            await file.write(b"half")
            await anyio.sleep_forever()
    assert await out(box, "cat /f; ls -A / | grep -c -e pykata -e new || true") == "old0\n"


async def test_modes(box: Container) -> None:
    async with box.files.open("/dir/f", "xb", parents=True, permissions=0o600) as file:
        for number in range(1000):
            await file.write(b"%d\n" % number)
    with pytest.raises(FilePresentError):
        async with box.files.open("/dir/f", "xb"):
            pass
    async with box.files.open("/dir/f", "ab") as file:
        await file.write(b"the end")
    async with box.files.open("/dir/f", "r+b", offset=2) as file:
        await file.write(b"X")
    async with box.files.open("/dir/f") as file:
        assert file.stat.mode == 0o600
        assert await file.read(6) == b"0\nX\n2\n"
        assert (await file.read()).endswith(b"999\nthe end")
        assert await file.read() == b""
    async with box.files.open("/dir/f", offset=4, size=4) as file:
        assert [piece async for piece in file] == [b"2\n3\n"]


async def test_fifos_are_streams(box: Container) -> None:
    await out(box, "mkfifo /fifo")
    with pytest.raises(FileError, match="regular"):
        await box.files.read_bytes("/fifo")
    async with anyio.create_task_group() as group:
        group.start_soon(out, box, "echo through > /fifo")
        async with box.files.open("/fifo") as file:
            assert await file.read() == b"through\n"
    with anyio.move_on_after(0.2):
        async with box.files.open("/fifo"):
            pytest.fail("nobody writes")
    assert await box.files.exists("/fifo")


# --- what is there ---


async def test_stat(box: Container) -> None:
    await out(box, "echo hello > /f; touch -d @1700000000 /f; chown 5:6 /f; chmod 4751 /f; ln -s f /l; ln -s none /d")
    found = await box.files.stat("/l")
    assert (found.kind, found.mode, found.uid, found.gid, found.size) == ("file", 0o4751, 5, 6, 6)
    assert (found.mtime_ns, found.links, found.target) == (1_700_000_000_000_000_000, 1, None)
    link = await box.files.lstat("/l")
    assert (link.kind, link.target) == ("symlink", "f")
    assert await box.files.readlink("/d") == "none"
    assert [await box.files.exists(path) for path in ("/l", "/d", "/f/x", "/dev/null")] == [True, False, False, True]
    assert await box.files.exists("/d", follow_symlinks=False)
    assert (await box.files.stat("/dev/null")).kind == "char"
    assert [await box.files.is_dir(path) for path in ("/", "/f", "/none")] == [True, False, False]


async def test_lists_and_walks(box: Container) -> None:
    await out(box, "mkdir -p /t/a/b /t/c; echo x > /t/a/b/f; ln -s ../c /t/a/l; touch /t/z")
    found = await box.files.list("/t")
    assert [(entry.name, entry.stat.kind) for entry in found] == [
        ("a", "directory"), ("c", "directory"), ("z", "file"),
    ]  # fmt: skip
    assert found[0].path == PurePosixPath("/t/a")
    walked = [
        (str(here), [entry.name for entry in directories], [entry.name for entry in others])
        async for here, directories, others in box.files.walk("/t")
    ]
    assert walked == [
        ("/t", ["a", "c"], ["z"]), ("/t/a", ["b"], ["l"]), ("/t/a/b", [], ["f"]), ("/t/c", [], []),
    ]  # fmt: skip
    async for _, directories, _ in box.files.walk("/t"):
        directories.clear()
    assert (await box.files.list("/t/a"))[1].stat.target == "../c"


async def test_links_that_nobody_may_read(box: Container) -> None:
    # Not even root in there may see where those of the container's first process lead.
    found = {entry.name: entry.stat for entry in await box.files.list("/proc/1")}
    assert found["cwd"].is_symlink()
    assert found["cwd"].target == ""
    assert (await box.files.lstat("/proc/1/cwd")).target == ""
    with pytest.raises(FileDeniedError):
        await box.files.readlink("/proc/1/cwd")
    assert found["status"].is_file()


async def test_a_hundred_thousand_files() -> None:
    # The kernel gives a tmpfs one inode for each two pages of memory.
    async with Sandbox(isolation="emulated", memory="1G") as large, large.container(BUSYBOX) as box:
        await out(box, "mkdir /many; cd /many; seq 1 100000 | xargs touch")
        found = await box.files.list("/many")
        assert len(found) == 100_000
        assert {entry.name for entry in found} == {str(number) for number in range(1, 100_001)}
        with pytest.raises(FileError, match="more than 99 entries"):
            await box.files.list("/many", limit=99)
        assert await box.files.exists("/many/7"), "the process was left in the middle of an answer"
        await box.files.remove("/many", recursive=True)
        assert not await box.files.exists("/many")


async def test_names_of_any_kind(box: Container) -> None:
    names = ["ü", "a b\n'\"$", "\udcff\udcfe", "x" * 255, "-rf", "é" * 127]
    for name in names:
        await box.files.write_text(f"/n/{name}", name.encode("utf-8", "surrogateescape").hex(), parents=True)
    assert {entry.name for entry in await box.files.list("/n")} == set(names)
    for name in names:
        assert await box.files.read_text(f"/n/{name}") == name.encode("utf-8", "surrogateescape").hex()
    with pytest.raises(FileError) as caught:
        await box.files.write_text("/n/" + "x" * 256, "")
    assert caught.value.errno == errno.ENAMETOOLONG


async def test_a_huge_sparse_file(box: Container) -> None:
    await box.files.write_text("/sparse", "begin")
    await box.files.truncate("/sparse", 5 * 1024 * MIB)
    async with box.files.open("/sparse", "r+b", offset=5 * 1024 * MIB - 3) as file:
        await file.write(b"end")
    assert (await box.files.stat("/sparse")).size == 5 * 1024 * MIB
    assert await box.files.read_bytes("/sparse", offset=5 * 1024 * MIB - 4) == b"\0end"
    assert await box.files.read_bytes("/sparse", size=6) == b"begin\0"


# --- changes ---


async def test_directories_and_names(box: Container) -> None:
    files = box.files
    await files.mkdir("/a/b/c", parents=True, mode=0o700)
    await files.mkdir("/a", exist_ok=True)
    with pytest.raises(FilePresentError):
        await files.mkdir("/a")
    with pytest.raises(FileMissingError):
        await files.mkdir("/x/y")
    await files.symlink("/a/link", "../../etc")
    await files.touch("/a/f", mtime_ns=1_234_567_890_123_456_789)
    assert (await files.stat("/a/f")).mtime_ns == 1_234_567_890_123_456_789
    await files.touch("/a/f")
    assert (await files.stat("/a/f")).mtime_ns > 1_600_000_000_000_000_000
    with pytest.raises(FilePresentError):
        await files.touch("/a/f", exist_ok=False)
    await files.hardlink("/a/g", "/a/f")
    assert (await files.stat("/a/g")).links == 2
    with pytest.raises(FilePresentError):
        await files.rename("/a/b", "/a/g", replace=False)
    await files.rename("/a/b/c", "/a/d")
    await files.chmod("/a/d", 0o1777)
    await files.chown("/a/d", 7, 8)
    assert await out(box, "stat -c '%a %u %g' /a/d; readlink /a/link") == "1777 7 8\n../../etc\n"
    with pytest.raises(FileError) as caught:
        await files.remove("/a")
    assert caught.value.errno == errno.ENOTEMPTY
    assert "recursive" in caught.value.hint
    await files.remove("/a/d")
    await files.remove("/a/link")
    await files.remove("/a", recursive=True)
    await files.remove("/a", missing_ok=True)
    assert await files.exists("/etc/passwd")


async def test_errors_are_those_of_pathlib(box: Container) -> None:
    with pytest.raises(FileNotFoundError, match="/none") as missing:
        await box.files.read_bytes("/none")
    assert isinstance(missing.value, FileMissingError)
    assert (missing.value.errno, missing.value.filename) == (errno.ENOENT, "/none")
    with pytest.raises(FileIsDirectoryError):
        await box.files.read_bytes("/etc")
    with pytest.raises(FileIsDirectoryError):
        await box.files.write_bytes("/etc", b"")
    with pytest.raises(FileNotDirectoryError):
        await box.files.list("/etc/passwd")
    with pytest.raises(FileMissingError):
        await box.files.write_bytes("/none/file", b"")
    with pytest.raises(FileError) as readonly:
        await box.files.write_bytes("/sys/x", b"")
    assert readonly.value.errno in (errno.EROFS, errno.EOPNOTSUPP)
    with pytest.raises(FileError, match="open") as special:
        await box.files.write_bytes("/dev/null", b"")
    assert special.value.errno == errno.EINVAL
    await box.files.write_text("/dev/null", "nothing", atomic=False)
    await box.files.write_text("/etc/hosts", "127.0.0.1 localhost\n")
    with pytest.raises(FileError) as magic:
        await box.files.read_bytes("/proc/self/exe")
    assert magic.value.errno == errno.ELOOP


async def test_as_another_user(box: Container) -> None:
    await box.files.write_text("/secret", "x", mode=0o600)
    nobody = box.files.as_user("65534:65534")
    with pytest.raises(PermissionError, match="as_user") as denied:
        await nobody.read_text("/secret")
    assert isinstance(denied.value, FileDeniedError)
    await box.files.mkdir("/open")
    await box.files.chmod("/open", 0o777)
    await nobody.write_text("/open/f", "mine")
    assert (await box.files.stat("/open/f")).uid == 65534
    with pytest.raises(FileDeniedError):
        await nobody.chown("/open/f", 0)


async def fill(box: Container, path: str) -> None:
    async with box.files.open(path, "wb") as file:
        while True:
            await file.write(bytes(MIB))


async def test_a_full_disk() -> None:
    async with Sandbox(isolation="emulated", disk="4M") as small, small.container(BUSYBOX) as box:
        await box.files.write_bytes("/f", b"old")
        with pytest.raises(FileError, match="disk=") as full:
            await box.files.write_bytes("/f", bytes(16 * MIB))
        assert full.value.errno == errno.ENOSPC
        with pytest.raises(FileError) as full:
            await fill(box, "/g")
        assert full.value.errno == errno.ENOSPC
        assert await box.files.read_bytes("/f") == b"old"
        assert not await box.files.exists("/g")


# --- the process behind it ---


async def test_cancelled_operations_leave_a_working_container(box: Container) -> None:
    await box.files.write_bytes("/f", bytes(MIB))
    for patience in (0.0, 0.001, 0.002, 0.005, 0.01, 0.02):
        with anyio.move_on_after(patience):
            while True:
                await box.files.read_bytes("/f")
    assert len(await box.files.read_bytes("/f")) == MIB


async def test_many_at_once(box: Container) -> None:
    async def one(number: int) -> None:
        await box.files.write_text(f"/f{number}", str(number))
        async with box.files.open(f"/s{number}", "wb") as file:
            await file.write(bytes(200_000))
        assert await box.files.read_text(f"/f{number}") == str(number)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(one, number)
    found = {entry.name for entry in await box.files.list("/")}
    assert found >= {f"{kind}{number}" for kind in "fs" for number in range(20)}


async def test_the_container_may_kill_it_but_not_look_into_it(box: Container) -> None:
    await box.files.write_text("/f", "x")
    find = "p=$(ps -o pid,comm | awk '/pykata-files/ {print $1}');"
    said = await box.run(sh(find + "cat /proc/$p/exe; cat /proc/$p/mem"))
    assert said.stderr.count("ermission denied") == 2
    # What changes nothing is asked of another one then, whether or not its end was known.
    for _ in range(5):
        await out(box, find + "kill -9 $p")
        assert await box.files.read_text("/f") == "x"
        await out(box, find + "kill -9 $p")
        assert (await box.files.stat("/f")).size == 1


async def test_a_container_that_was_left(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        await container.files.write_text("/f", "x")
    with pytest.raises(SandboxClosedError):
        await container.files.read_text("/f")
