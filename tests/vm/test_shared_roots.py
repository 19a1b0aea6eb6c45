"""Root filesystems whose files are shared, by virtio-fs and by 9p: they are what a disk would be."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import anyio
import pytest

from pykata import ConfigError, HostError, NineP, Sandbox, ShareLostError, VirtioFS
from pykata.agent.client import AgentClient
from tests.images_fixtures import CAPABILITY
from tests.vm.test_image_trees import WALKER
from tests.vm.test_volumes import daemons, known_daemons, sh

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can make owners and device nodes")

FILESYSTEMS = ["virtiofs", "9p"]


def sandbox(fs: Any, **options: Any) -> Sandbox:
    return Sandbox(fs=fs, isolation="emulated", template="off", **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root filesystem with busybox, the walker, and what images have seldom."""
    root = tmp_path_factory.mktemp("image") / "root"
    busybox = shutil.which("busybox")
    assert busybox is not None
    for name in ("bin", "etc", "tmp", "a", "a/sticky"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    for applet in ("sh", "cat", "ls", "chmod", "ln", "mv", "rm", "echo", "stat", "id", "head", "mkdir", "touch", "su"):
        os.link(root / "bin/busybox", root / "bin" / applet)
    (root / "bin/busybox").chmod(0o4755)
    subprocess.run(["gcc", "-static", "-O2", "-o", root / "walker", WALKER], check=True)
    shutil.copy(busybox, root / "ping")
    os.setxattr(root / "ping", "security.capability", CAPABILITY)
    (root / "a/file").write_text("content\n")
    os.chown(root / "a/file", 1234, 70_000)
    (root / "a/file").chmod(0o640)
    os.setxattr(root / "a/file", "user.colour", b"blue\0green")
    (root / "a/sticky").chmod(0o1777)
    os.chown(root / "a/sticky", 5, 6)
    os.symlink("../a/file", root / "a/link")
    os.symlink("/etc/nowhere", root / "a/dangling")
    os.mknod(root / "a/node", stat.S_IFBLK | 0o640, os.makedev(7, 300))
    os.mknod(root / "a/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(root / "a/fifo")
    (root / os.fsdecode(b"a/not-utf8-\xff")).write_bytes(b"x")
    (root / ("a/" + "n" * 255)).write_bytes(b"long")
    (root / "a/empty").touch()
    with (root / "a/sparse").open("wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"data")
    (root / "a/secret").write_bytes(b"of root\n")
    (root / "a/secret").chmod(0o600)
    return root


@pytest.fixture(scope="module")
def archive(root: Path) -> Path:
    """The same as a tar."""
    path = root.parent / "root.tar"
    subprocess.run(["tar", "--xattrs", "--xattrs-include=*", "-C", root, "-cf", path, "."], check=True)
    return path


async def tree(fs: Any, image: str) -> list[str]:
    async with sandbox(fs) as sb:
        done = await sb.run(image, ["/walker"], user="0", max_output=1 << 26)
    assert done.exit_code == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if line)


@pytest.mark.parametrize("kind", ["dir", "tar"])
async def test_the_tree_in_the_guest_is_that_of_a_disk(root: Path, archive: Path, kind: str) -> None:
    image = f"dir:{root}" if kind == "dir" else f"tar:{archive}"
    expected = await tree("block", image)
    assert len(expected) > 30
    for fs in FILESYSTEMS:
        found = await tree(fs, image)
        assert (sorted({*expected} - {*found}), sorted({*found} - {*expected})) == ([], []), fs


@pytest.mark.parametrize("fs", FILESYSTEMS)
async def test_containers(fs: str, root: Path, archive: Path) -> None:
    image = f"tar:{archive}"
    async with sandbox(fs) as sb:
        done = await sb.run(image, sh("cat a/file; echo more >> a/file; cat a/file; chmod 600 a/secret; cat a/secret"))
        assert (done.exit_code, done.stdout) == (0, "content\ncontent\nmore\nof root\n")
        assert (await sb.run(image, ["cat", "/a/file"])).stdout == "content\n", "the last container's was its own"
        # As another user: its rights are those that the image says, whatever the host's files are.
        assert (await sb.run(image, ["cat", "/a/secret"], user="1234")).exit_code == 1
        assert (await sb.run(image, ["cat", "/a/file"], user="1234")).stdout == "content\n"
        async with sb.container(image) as one, sb.container(f"dir:{root}") as two:
            await one.run(sh("rm a/link; mv a/sparse a/moved; chmod 700 a/file; mkdir new; echo 1 > new/x"), check=True)
            found = {(change.kind, str(change.path)) for change in await one.changes()}
            assert found >= {("modified", "/a/file"), ("deleted", "/a/link"), ("deleted", "/a/sparse"),
                             ("added", "/a/moved"), ("added", "/new/x")}
            assert await one.files.read_bytes("/a/file") == b"content\n"
            assert await two.files.read_bytes("/a/file") == b"content\n"
            assert (await two.run(["stat", "-c", "%u:%g %a", "/a/file"])).stdout == "1234:70000 640\n"
        # A disk is a disk.
        assert (await sb.run("builtin:busybox", ["echo", "x"])).stdout == "x\n"


@pytest.mark.parametrize("fs", FILESYSTEMS)
async def test_changes_have_their_content(fs: str, archive: Path, tmp_path: Path) -> None:
    import tarfile

    async with sandbox(fs) as sb, sb.container(f"tar:{archive}") as container:
        await container.run(sh("chmod 755 a/file"), check=True)
        await container.export_changes(tmp_path / "layer.tar")
    with tarfile.open(tmp_path / "layer.tar") as layer:
        member = layer.extractfile("a/file")
        assert member is not None
        assert member.read() == b"content\n"


@pytest.mark.parametrize("fs", FILESYSTEMS)
async def test_a_guest_sees_the_images_that_it_runs_and_no_others(fs: str, root: Path, archive: Path) -> None:
    # Not even a guest whose containers are let look: a volume at the place where its agent has the images.
    async with sandbox(fs) as sb:
        running = sb._open
        from pykata.fs.shelf import on_shelf

        async with sb.container(f"tar:{archive}") as container:
            await container.run(["echo"], check=True)
            async with on_shelf(running.run_dir, root) as name:
                assert name == "2"
            async with on_shelf(running.run_dir, root) as name:
                assert name == "2", "a directory that comes again has the name that the guest knows"
            with pytest.raises(HostError, match="can't share /nowhere: /nowhere: No such file"):
                async with on_shelf(running.run_dir, Path("/nowhere")):
                    pass
        # Namespaces of the server: nothing of it is left on the host's side.
        assert not list((running.run_dir / "images").iterdir())


@pytest.mark.parametrize("fs", FILESYSTEMS)
async def test_many_containers_at_once(fs: str, archive: Path) -> None:
    outputs: list[str] = []
    async with sandbox(fs, memory="512M") as sb:

        async def one(number: int) -> None:
            outputs.append((await sb.run(f"tar:{archive}", sh(f"cat a/file; echo {number}"), check=True)).stdout)

        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(one, number)
    assert sorted(outputs) == [f"content\n{number}\n" for number in range(6)]


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("daemon", known_daemons())
async def test_a_daemon_that_is_killed(
    archive: Path, daemon: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs any more where its files were; a container whose image is a disk goes on, and others can be made."""
    monkeypatch.setenv("PYKATA_VIRTIOFSD", daemon)
    why = "files of the host are lost, because virtiofsd for images .*"
    failing, abort = anyio.Event(), AgentClient.abort_share

    async def noted(agent: AgentClient, tag: str, *, timeout: float) -> None:
        await abort(agent, tag, timeout=timeout)
        failing.set()

    monkeypatch.setattr(AgentClient, "abort_share", noted)
    async with sandbox("virtiofs") as sb, sb.container("builtin:busybox") as own:
        # What the guest has read it keeps; the file it hasn't.
        script = sh("echo begun; read x; cat a/file || echo failed")
        async with sb.container(f"tar:{archive}") as container, sb.process(f"tar:{archive}", script) as process:
            assert await anext(process.stdout) == b"begun\n"
            os.kill(sorted(daemons())[which], signal.SIGKILL)
            await failing.wait()
            await process.stdin.send(b"\n")
            assert await process.stdout.read() == b"failed\n"
            assert await process.wait() == 0
            assert isinstance(process.lost, ShareLostError)
            for _ in range(2):
                with pytest.raises(ShareLostError, match=why):
                    await container.run(["cat", "/a/file"])
                with pytest.raises(ShareLostError, match=why):
                    await container.files.read_bytes("/a/file")
                with pytest.raises(ShareLostError, match=why):
                    await sb.run(f"tar:{archive}", ["true"])
            assert (await own.run(["echo", "x"])).check().stdout == "x\n"
        assert (await own.run(["echo", "y"])).check().stdout == "y\n"
        assert (await sb.run("builtin:busybox", ["echo", "z"])).check().stdout == "z\n"


@pytest.mark.parametrize("fs", FILESYSTEMS)
async def test_a_detached_sandbox(fs: str, archive: Path) -> None:
    detached = await sandbox(fs).detach("shared-root", f"tar:{archive}")
    try:
        async with Sandbox.connect("shared-root") as sb:
            assert (await sb.main.run(["cat", "/a/file"])).stdout == "content\n"
            assert (await sb.run(f"tar:{archive}", ["cat", "/a/file"])).stdout == "content\n"
    finally:
        await detached.stop()


async def test_a_directory_with_something_mounted_below_it(tmp_path: Path, root: Path) -> None:
    (tmp_path / "r" / "below").mkdir(parents=True)
    shutil.copytree(root / "bin", tmp_path / "r" / "bin")
    await anyio.run_process(["mount", "-t", "tmpfs", "x", tmp_path / "r" / "below"])
    try:
        async with sandbox("virtiofs") as sb:
            with pytest.raises(HostError, match="other file systems that are mounted below"):
                await sb.run(f"dir:{tmp_path}/r", ["/bin/busybox", "true"])
            assert (await sb.run("builtin:busybox", ["echo", "x"])).stdout == "x\n", "the sandbox goes on"
    finally:
        await anyio.run_process(["umount", tmp_path / "r" / "below"])


@pytest.mark.parametrize("cache", ["auto", "none"])
async def test_other_caches(cache: Any, archive: Path) -> None:
    for fs in (VirtioFS(cache=cache), NineP(cache=cache)):
        async with sandbox(fs) as sb:
            assert (await sb.run(f"tar:{archive}", ["cat", "/a/file"], check=True)).stdout == "content\n"


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache='some' is unknown"):
        VirtioFS(cache="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cache='some' is unknown"):
        NineP(cache="some")  # type: ignore[arg-type]
