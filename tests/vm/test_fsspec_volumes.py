"""Filesystems of Python as volumes: what a guest does with them, and what they do to it."""

from __future__ import annotations

import io
import threading
import zipfile
from typing import Any

import anyio
import fsspec
import pytest
from fsspec.implementations.zip import ZipFileSystem

from pykata import ConfigError, FsspecVolume, Sandbox, Tmpfs
from tests.unit.memory_tree import Memory
from tests.vm.test_volumes import BUSYBOX, sh


def sandbox(volumes: dict[str, Any]) -> Sandbox:
    return Sandbox(isolation="emulated", volumes=volumes)


async def test_a_filesystem_in_memory() -> None:
    fs = Memory()
    fs.pipe({"/in/a": b"content\n", "/in/d/b": b"below\n"})
    volumes = {"/data": FsspecVolume(fs, "/in"), "/ro": FsspecVolume(fs, "/in", readonly=True), "/all": fs,
               "/t": Tmpfs("1M")}  # fmt: skip
    async with sandbox(volumes) as sb:
        done = await sb.run(BUSYBOX, sh("cd /data; ls; cat a d/b; stat -c '%F %s %U' a; cat /ro/a /all/in/a"))
        assert done.stdout == "a\nd\ncontent\nbelow\nregular file 8 root\ncontent\ncontent\n", done.stderr
        await sb.run(BUSYBOX, sh("""set -e; cd /data
            echo new > n; echo more >> a; mkdir -p x/y; mv d x/y/d; rm n; echo 2 > x/2; cp a x/y/copy; sync
            dd if=/dev/zero of=big bs=1k count=300 2>/dev/null; echo end >> big"""), check=True)
        assert fs.cat_file("/in/a") == b"content\nmore\n"
        assert fs.cat_file("/in/x/y/d/b") == b"below\n"
        assert fs.cat_file("/in/x/y/copy") == b"content\nmore\n"
        assert fs.cat_file("/in/big") == bytes(300 * 1024) + b"end\n"
        assert not fs.exists("/in/n")
        done = await sb.run(BUSYBOX, sh("echo x > /ro/a; echo x > /ro/new; rm /ro/a; cat /ro/big | wc -c"))
        assert done.stderr.count("Read-only file system") == 3
        assert done.stdout == "307204\n"
        # Another user of a container has the same rights: the files have no owner.
        assert (await sb.run(BUSYBOX, sh("echo 1 > /data/by-other"), user="1000")).exit_code == 0
        # And what the program does to it the guest sees, at the latest after it opens the file again.
        fs.pipe_file("/in/later", b"from outside\n")
        assert (await sb.run(BUSYBOX, ["cat", "/data/later"])).stdout == "from outside\n"


async def test_those_of_fsspec_and_what_a_guest_may_add() -> None:
    files, packed = fsspec.filesystem("memory"), io.BytesIO()
    files.pipe_file("/limited/there", b"before\n")
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("in/side", "zipped\n")
    volumes = {"/many": FsspecVolume(files, "/limited", files=50, size="8K"), "/mine": FsspecVolume(Memory()),
               "/zip": ZipFileSystem(packed)}  # fmt: skip
    try:
        async with sandbox(volumes) as sb:
            # The number of files is what ends it; a file more than there may be is none that is empty.
            script = "cat /many/there /zip/in/side; i=0; while echo > /many/$i; do i=$((i+1)); done; echo $i; " \
                     "rm /many/0; echo x > /many/again; cat /many/again; echo on > /mine/f; cat /mine/f; " \
                     "dd if=/dev/zero of=/many/1 bs=1k count=20; echo x > /zip/x"
            done = await sb.run(BUSYBOX, sh(script))
        assert done.stdout.splitlines() == ["before", "zipped", "50", "x", "on"], done.stderr
        assert done.stderr.count("No space left on device") == 2, done.stderr
        assert "can't create /zip/x" in done.stderr, "a zip that was opened for reading isn't written to"
        assert len(files.ls("/limited")) == 51
        assert files.cat_file("/limited/there") == b"before\n"
    finally:
        files.rm("/limited", recursive=True)


async def test_a_filesystem_that_raises_or_hangs_fails_the_operation_and_not_the_sandbox() -> None:
    release = threading.Event()

    class Bad(Memory):
        def cat_file(self, path: str, **more: Any) -> bytes:
            raise PermissionError(path)

        def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
            if mode != "rb":
                return super()._open(path, mode=mode, **more)
            if path.endswith("slow"):
                release.wait()
            raise ZeroDivisionError

    fs = Bad()
    fs.pipe({"/f": b"1", "/slow": b"2"})
    try:
        async with sandbox({"/v": FsspecVolume(fs, timeout=5)}) as sb:
            done = await sb.run(BUSYBOX, sh("cat /v/f; cat /v/slow; echo 1 >> /v/f; ls /v; echo on"), timeout=600)
            assert done.stdout == "f\nslow\non\n"
            said = done.stderr.splitlines()
            assert "Input/output error" in said[0] or "I/O error" in said[0]
            assert "timed out" in said[1]
            assert "ermission denied" in said[2]
    finally:
        release.set()


async def test_many_readers_and_writers() -> None:
    fs = Memory()
    fs.pipe({f"/{number}": b"%d\n" % number for number in range(50)})
    async with sandbox({"/v": fs}) as sb, anyio.create_task_group() as tasks:

        async def one(number: int) -> None:
            script = f"cat /v/* | wc -l; for i in 1 2 3; do echo $i >> /v/new{number}; done"
            assert int((await sb.run(BUSYBOX, sh(script), check=True)).stdout) >= 50

        for number in range(4):
            tasks.start_soon(one, number)
    assert [fs.cat_file(f"/new{number}") for number in range(4)] == [b"1\n2\n3\n"] * 4


async def test_the_end_of_a_sandbox_in_the_middle_of_writing() -> None:
    fs = Memory()
    script = sh("exec 3> /v/f; echo begun >&3; echo begun; sleep 100")
    async with sandbox({"/v": fs}) as sb, sb.process(BUSYBOX, script) as process:
        assert (await anext(process.stdout)).startswith(b"begun")
    assert fs.cat_file("/f") == b"begun\n"


@pytest.mark.parametrize("after", [0.0, 0.3, 1.2, 1.6])
async def test_a_cancelled_boot(after: float) -> None:
    fs = Memory()
    with anyio.move_on_after(after):
        async with sandbox({"/v": fs}):
            pass
    assert fs.store == {}       # and what is left behind, the fixture of every test looks for


async def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no filesystem of fsspec"):
        FsspecVolume("memory")
    with pytest.raises(ConfigError, match=r"path='\.\./x' is no path"):
        FsspecVolume(Memory(), "../x")
    with pytest.raises(ConfigError, match="timeout=0 is not a duration"):
        FsspecVolume(Memory(), timeout=0)
    with pytest.raises(ConfigError, match="can't be a volume of a sandbox that outlives it"):
        await sandbox({"/v": Memory()}).detach("nobody")
