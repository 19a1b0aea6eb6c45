"""A virtiofsd that is killed while it is used: the guest's I/O fails, the sandbox says why, and the rest goes on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from anyio.lowlevel import checkpoint

from pykata import (
    QEMU,
    AgentRefusedError,
    Bind,
    CommandFailedError,
    Completed,
    Container,
    FileError,
    Process,
    Sandbox,
    ShareLostError,
)
from pykata.agent.client import AgentClient
from tests.settling import settled
from tests.vm.test_volumes import _read, daemons, known_daemons, sh

BUSYBOX = "builtin:busybox"
PROGRAM = Path(__file__).with_name("lost.c")
FAILED = {"EIO", "ENOTCONN"}
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What uses files until that fails."""
    binary = tmp_path_factory.mktemp("lost") / "lost"
    subprocess.run(["gcc", "-static", "-O2", "-s", "-o", binary, PROGRAM, "-lpthread"], check=True)
    return binary.read_bytes()


@pytest.fixture(params=known_daemons())
def daemon(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each virtiofsd of this host."""
    monkeypatch.setenv("PYKATA_VIRTIOFSD", request.param)


def serving(tag: str) -> list[int]:
    """The processes of the daemon of this device, the one that was started first."""
    def words(pid: int) -> bytes:
        return _read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b"/")

    return sorted(pid for pid in daemons() if f"/{tag}/".encode() in words(pid))


def kill(tag: str, which: int = 0) -> None:
    os.kill(serving(tag)[which], signal.SIGKILL)


def said(done: Completed) -> dict[str, str]:
    """What came of each operation."""
    return dict(line.split(": ") for line in done.stdout.splitlines() if ": " in line)


@asynccontextmanager
async def using(container: Container, *args: str) -> AsyncIterator[Process]:
    """The program, which has used its file by now."""
    async with container.process(["/tmp/lost", *args]) as process:
        assert await anext(process.stdout) == b"begun\n"
        yield process


async def rest(process: Process) -> dict[str, str]:
    out = (await process.stdout.read()).decode()
    await process.wait()
    return dict(line.split(": ") for line in out.splitlines() if ": " in line)


async def prepared(container: Container, program: bytes) -> None:
    await container.files.write_bytes("/tmp/lost", program)
    await container.files.chmod("/tmp/lost", 0o755)


def filled(directory: Path) -> Path:
    directory.mkdir()
    with (directory / "large").open("wb") as file:
        for _ in range(16):
            file.write(os.urandom(MIB))
    (directory / "many").mkdir()
    for number in range(500):
        (directory / "many" / str(number)).touch()
    return directory


@pytest.mark.parametrize("machine", ["microvm", "q35"])
async def test_everything_under_way_fails(
    tmp_path: Path, daemon: None, machine: Literal["microvm", "q35"], program: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    # Two that share a daemon, and one that is alone.
    (tmp_path / "one").write_text("x\n")
    volumes: dict[str, Any] = {
        "/v": filled(tmp_path / "v"), "/one": tmp_path / "one", "/w": Bind(filled(tmp_path / "w"), cache="always"),
    }  # fmt: skip
    caplog.set_level(logging.WARNING, "pykata.lost")
    sandbox = Sandbox(QEMU(machine=machine), isolation="emulated", volumes=volumes, memory="512M")
    async with sandbox as sb, sb.container(BUSYBOX) as container, sb.container(BUSYBOX) as other:
        await prepared(container, program)
        async with AsyncExitStack() as stack:
            use = partial(using, container)
            writer = await stack.enter_async_context(use("write", "/v/new"))
            reader = await stack.enter_async_context(use("read", "/v/large"))
            mapper = await stack.enter_async_context(use("map", "/v/large"))
            lister = await stack.enter_async_context(use("list", "/v/many"))
            cacher = await stack.enter_async_context(use("dirty", "/w/new"))
            count = sh("while read x; do for i in $(seq 100); do echo $i >> /own; done; wc -l < /own; done")
            neighbour = await stack.enter_async_context(other.process(count))
            async with anyio.create_task_group() as group:
                group.start_soon(_refused, container, tmp_path / "copy")
                kill("fs-auto")
                # Each of them ends by itself.
                written, read, listed = await rest(writer), await rest(reader), await rest(lister)
                await mapper.wait()
            assert set(written.values()) | set(read.values()) <= FAILED
            assert (set(written), set(read)) == ({"write", "fsync", "stat", "open"}, {"read", "fsync", "stat", "open"})
            assert listed["list"] in FAILED
            assert (mapper.reason, mapper.signal) == ("signal", signal.SIGBUS)
            assert isinstance(reader.lost, ShareLostError)
            why = f"because virtiofsd for {tmp_path}/one, {tmp_path}/v was killed by SIGKILL"
            assert f"the guest goes on without files of the host, {why}" in caplog.text
            await neighbour.stdin.send(b"go on\n")
            assert await anext(neighbour.stdout) == b"100\n"
            # The other daemon serves, until it is killed as well.
            done = await container.run(["wc", "-c", "/w/large"])
            assert (done.exit_code, done.stdout) == (0, f"{16 * MIB} /w/large\n")
            assert isinstance(done.error, ShareLostError)
            kill("fs-always", -1)       # the one that answers: with the other it ends a moment later
            await cacher.stdin.send(b"\n")
            assert (await rest(cacher))["fsync"] in FAILED, "what waited in the guest is lost, and it is told"
            assert f"because virtiofsd for {tmp_path}/w " in caplog.text
            await neighbour.stdin.send(b"go on\n")
            assert await anext(neighbour.stdout) == b"200\n"
        for place in ("/v/large", "/w/large"):
            with pytest.raises(FileError) as caught:
                await container.files.read_bytes(place)
            assert caught.value.errno in (errno.EIO, errno.ENOTCONN)
        assert len(await other.files.read_text("/own")) > 200, "what is elsewhere can be saved"
        for _ in range(2):
            with pytest.raises(ShareLostError, match=why):
                await sb.run(BUSYBOX, ["true"])
    assert not daemons()


async def _refused(container: Container, target: Path) -> None:
    async def download() -> None:
        while True:
            await container.files.download("/v", target)
            shutil.rmtree(target)

    with pytest.raises(FileError) as caught:
        await download()
    assert caught.value.errno in (errno.EIO, errno.ENOTCONN)


@pytest.mark.parametrize("which", [0, -1])
async def test_a_command_ends_by_itself(tmp_path: Path, daemon: None, which: int) -> None:
    """Whichever of the daemon's processes it is."""
    async with Sandbox(isolation="emulated", volumes={"/v": tmp_path}) as sb:
        script = "echo begun; while echo x > /v/file; do cat /v/file > /dev/null; done; echo over >&2; exit 3"
        done = await sb.run(BUSYBOX, sh(script), on_stdout=lambda _: kill("fs-auto", which))
        assert (done.reason, done.exit_code, done.stdout) == ("exit", 3, "begun\n")
        assert done.stderr.endswith("over\n")
        assert isinstance(done.error, ShareLostError)
        why = f"'sh' ended with exit code 3; files of the host are lost, because virtiofsd for {tmp_path} "
        with pytest.raises(CommandFailedError, match=why):
            done.check()


@pytest.mark.parametrize("count", [100, 1500])
async def test_requests_that_nobody_answers(tmp_path: Path, daemon: None, count: int, program: bytes) -> None:
    """As many as there are: also more than the device's queue takes."""
    filled(tmp_path / "v")
    async with Sandbox(isolation="emulated", volumes={"/v": tmp_path / "v"}) as sb, sb.container(BUSYBOX) as container:
        await prepared(container, program)
        async with using(container, "many", "/v/large", str(count)) as process:
            for pid in serving("fs-auto"):
                os.kill(pid, signal.SIGSTOP)
            await process.stdin.send(b"\n")
            assert await anext(process.stdout) == f"{count} wait\n".encode()
            for pid in serving("fs-auto"):
                os.kill(pid, signal.SIGKILL)
            # What was in memory already needs nobody's answer.
            assert await anext(process.stdout) == f"{count} of {count} failed\n".encode()
            assert await process.wait() == 0


async def test_while_it_is_idle(tmp_path: Path, daemon: None) -> None:
    (tmp_path / "f").write_text("x\n")
    async with Sandbox(isolation="emulated", volumes={"/v": tmp_path}) as sb, sb.container(BUSYBOX) as container:
        await container.run(["cat", "/v/f"], check=True)
        kill("fs-auto")
        while (done := await container.run(["cat", "/v/f"])).error is None:
            pass        # it came before anybody heard of it
        while done.exit_code == 0:
            done = await container.run(["cat", "/v/f"])
        with pytest.raises(ShareLostError):
            async with sb.container(BUSYBOX):
                raise AssertionError("there is a container")


async def test_while_it_is_paused(tmp_path: Path, daemon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told when it goes on: while it stands still it answers nothing, and isn't to be ended for that."""
    asked: list[bool] = []
    ask = AgentClient.abort_share

    async def noted(agent: AgentClient, tag: str, *, timeout: float) -> None:
        asked.append(sb._open.is_paused)
        await ask(agent, tag, timeout=timeout)

    monkeypatch.setattr(AgentClient, "abort_share", noted)
    (tmp_path / "f").write_text("x\n")
    async with Sandbox(isolation="emulated", volumes={"/v": tmp_path}) as sb, sb.container(BUSYBOX) as container:
        await container.run(["cat", "/v/f"], check=True)
        await sb.pause()
        kill("fs-auto")
        while not sb._open.losses:
            await checkpoint()
        await settled()
        await sb.resume()
        while (done := await container.run(["cat", "/v/f"])).exit_code == 0:
            pass
        assert isinstance(done.error, ShareLostError)
        assert asked == [False]


@pytest.mark.parametrize("which", [0, -1])
async def test_a_guest_that_cant_go_on_without(
    tmp_path: Path, daemon: None, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of an older bundle, say: the machine is ended, and all that runs there."""

    async def unknown(agent: AgentClient, tag: str, *, timeout: float) -> None:
        raise AgentRefusedError("AbortShare: unknown", status="UNIMPLEMENTED")

    monkeypatch.setattr(AgentClient, "abort_share", unknown)
    why = rf"was ended, because virtiofsd for {tmp_path} .*"
    async with Sandbox(isolation="emulated", volumes={"/v": tmp_path}) as sb:
        async with sb.process(BUSYBOX, sh("echo beside; exec sleep 10000")) as process:
            assert await anext(process.stdout) == b"beside\n"
            script = sh("dd if=/dev/zero of=/v/file bs=1k count=1; echo begun; "
                        "while :; do echo x > /v/file; cat /v/file > /dev/null; done")
            done = await sb.run(BUSYBOX, script, on_stdout=lambda _: kill("fs-auto", which))
            assert (done.reason, done.stdout) == ("vm_died", "begun\n"), "what it wrote is kept"
            assert isinstance(done.error, ShareLostError)
            with pytest.raises(CommandFailedError, match=why):
                done.check()
            with pytest.raises(ShareLostError, match=why):
                await process.wait()
        with pytest.raises(ShareLostError, match=why):
            await sb.run(BUSYBOX, ["true"])
