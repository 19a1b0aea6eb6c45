"""Detached sandboxes over fakes: a real keeper process, a real socket, and a virtual machine that isn't there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import anyio
import pytest

import pykata
from pykata import (
    BootError,
    CommandFailedError,
    ConfigError,
    Detached,
    DetachedEndedError,
    DetachedError,
    DetachedLostError,
    DetachedNotFoundError,
    DetachedTakenError,
    ImageNotFoundError,
    Sandbox,
    SandboxClosedError,
    VMDiedError,
    collect_garbage,
    find_detached,
    list_detached,
)
from pykata.detached import directory as directories
from pykata.host import run_root, state_dir
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"
NAME = "worker"
ROOT = Path(__file__).resolve().parents[2]


async def talk(process: FakeProcess) -> int:
    """Says who it is, then repeats what it reads."""
    await process.write(b"out\n")
    await process.write_error(b"err\xff\n")
    while piece := await process.read():
        await process.write(piece)
    return 3


async def stubborn(process: FakeProcess) -> int:
    process.ignores.add(signal.SIGTERM)
    await process.write(b"ready\n")
    await anyio.sleep_forever()
    return 0


COMMANDS = {"talk": talk, "stubborn": stubborn}


def sandbox(**options: object) -> Sandbox:
    return Sandbox(FakeHypervisor(commands=COMMANDS, **options), FakeFs())  # type: ignore[arg-type]


@asynccontextmanager
async def detached(*cmd: str, name: str = NAME, **options: object) -> AsyncIterator[Detached]:
    """A detached sandbox that is gone when the block is left."""
    handle = await sandbox(**options).detach(name, BUSYBOX, cmd or None)
    try:
        yield handle
    finally:
        await gone(name)


async def gone(name: str) -> None:
    with anyio.CancelScope(shield=True):
        try:
            await find_detached(name).stop(grace=0)
            await find_detached(name).remove()
        except DetachedNotFoundError:
            pass


async def logged(handle: Detached, *, follow: bool = False) -> dict[str, bytes]:
    said = {"stdout": b"", "stderr": b""}
    async with aclosing(handle.logs(follow=follow)) as pieces:
        async for piece in pieces:
            said[piece.stream] += piece.data
    return said


# --- its life ---


async def test_a_main_command_to_its_end() -> None:
    async with detached("talk") as handle:
        assert (handle.phase, handle.args, handle.image) == ("running", ("talk",), BUSYBOX) or handle.phase == "ended"
        ended = await handle.wait()
        assert (ended.phase, ended.exit_code, ended.reason) == ("ended", 3, "exit")
        assert ended.ended is not None
        assert await logged(handle) == {"stdout": b"out\n", "stderr": b"err\xff\n"}
        assert list_detached() == [ended]
        with pytest.raises(DetachedEndedError, match="ended with exit code 3") as caught:
            await connect_once(NAME)
        assert caught.value.name == NAME


async def connect_once(name: str) -> None:
    async with Sandbox.connect(name):
        pass


async def test_it_survives_the_program_that_started_it(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        "import anyio\nfrom tests.unit import test_detached as t\n"
        "anyio.run(t.sandbox().detach, 'worker', t.BUSYBOX, ['sleep', '1000'])\n"
    )
    try:
        await anyio.run_process([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert find_detached(NAME).phase == "running"
        async with Sandbox.connect(NAME) as sb:
            assert (await sb.main.run(["echo", "hello"])).stdout == "hello\n"
    finally:
        await gone(NAME)
    assert list_detached() == []


async def test_without_a_command_it_stays_and_leaves_nothing() -> None:
    handle = await sandbox().detach(NAME, BUSYBOX)
    async with Sandbox.connect(NAME) as sb:
        assert (await sb.main.run(["echo", "a"])).stdout == "a\n"
    assert (await handle.refresh()).phase == "running"
    assert (await handle.stop()).phase == "ended"
    assert list_detached() == []


async def test_without_an_image_there_is_no_main_container() -> None:
    await sandbox().detach(NAME)
    async with Sandbox.connect(NAME) as sb:
        assert (await sb.run(BUSYBOX, ["echo", "a"])).stdout == "a\n"
        with pytest.raises(ConfigError, match="no main container"):
            sb.main  # noqa: B018
    await find_detached(NAME).stop()


async def test_the_image_s_own_command() -> None:
    handle = await sandbox().detach(NAME, BUSYBOX, own_command=True)
    try:
        ended = await handle.wait()
        assert (ended.args, ended.exit_code) == (("true",), 0)
    finally:
        await gone(NAME)


# --- its use ---


async def test_the_api_is_the_same() -> None:
    async with detached(), Sandbox.connect(NAME) as sb:
        assert sb.accel == "kvm"
        assert sb.features.name == "fake"
        assert sb.console
        assert sb.timings.ready is not None
        done = await sb.run(BUSYBOX, ["cat"], input=b"x" * 300_000)
        assert done.stdout_bytes == b"x" * 300_000
        async with sb.container(BUSYBOX) as container:
            assert container.id != sb.main.id
            async with container.process(["talk"]) as process:
                await process.stdin.send(b"hello")
                await process.stdin.aclose()
                assert await process.stdout.read() == b"out\nhello"
                assert await process.wait() == 3
        with pytest.raises(CommandFailedError):
            await sb.main.run(["false"], check=True)
        assert (await sb.main.run(["sleep", "1000"], timeout=0.05)).reason == "timeout"


async def test_ids_of_clients_differ() -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(detached())
        one, two = [await stack.enter_async_context(Sandbox.connect(NAME)) for _ in range(2)]
        first, second = [await stack.enter_async_context(sb.container(BUSYBOX)) for sb in (one, two)]
        assert len({first.id, second.id, one.main.id}) == 3
        a, b = [await stack.enter_async_context(sb.main.process(["cat"])) for sb in (one, two)]
        await a.stdin.aclose()
        assert await a.wait() == 0
        assert not b.ended


async def test_ten_clients_at_once() -> None:
    async def client(number: int) -> None:
        async with Sandbox.connect(NAME) as sb:
            for _ in range(3):
                done = await sb.main.run(["echo", str(number)])
                assert done.stdout == f"{number}\n"

    async with detached(), anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(client, number)


async def test_disk_slots_are_shared_and_given_back() -> None:
    async with detached(disk_slots=2), Sandbox.connect(NAME) as one:
        async with Sandbox.connect(NAME) as two, two.container(BUSYBOX):
            with anyio.move_on_after(0.05) as waited:
                await one.run(BUSYBOX, ["true"])
            assert waited.cancelled_caught
        assert (await one.run(BUSYBOX, ["true"])).ok


async def test_leaving_a_connection_ends_what_it_has() -> None:
    async with detached():
        async with AsyncExitStack() as stack:
            sb = await stack.enter_async_context(Sandbox.connect(NAME))
            process = await stack.enter_async_context(sb.main.process(["sleep", "1000"]))
            assert process.pid
        with pytest.raises(SandboxClosedError):
            await sb.run(BUSYBOX, ["true"])
        async with Sandbox.connect(NAME) as other:
            assert (await other.main.run(["echo", "still here"])).ok


# --- its end ---


async def test_stop_asks_and_then_kills() -> None:
    async with detached("stubborn") as handle:
        ended = await handle.stop(grace=0.1)
        assert (ended.exit_code, ended.reason) == (137, "signal")
        assert (await handle.stop()) == ended
    async with detached("sleep", "1000") as handle:
        ended = await handle.stop(grace=60)
        assert (ended.exit_code, ended.reason) == (143, "signal")


async def test_signals() -> None:
    async with detached("sleep", "1000") as handle:
        await handle.send_signal(signal.SIGUSR1)
        assert (await handle.wait()).exit_code == 128 + signal.SIGUSR1
        with pytest.raises(DetachedEndedError):
            await handle.kill()
    async with detached() as handle:
        with pytest.raises(ConfigError, match="no command"):
            await handle.send_signal(signal.SIGHUP)
        with pytest.raises(ConfigError, match="not a signal"):
            await handle.send_signal(1000)
        await handle.kill()
        await handle.wait()
    assert list_detached() == []


async def test_clients_are_told_that_it_was_stopped() -> None:
    async with detached() as handle, Sandbox.connect(NAME) as sb:
        async with sb.main.process(["sleep", "1000"]) as process:
            await handle.stop()
            with pytest.raises(VMDiedError, match="'worker' has ended: it was stopped"):
                await process.wait()
        with pytest.raises(VMDiedError, match="it was stopped"):
            await sb.run(BUSYBOX, ["true"])


async def test_a_machine_that_dies() -> None:
    handle = await sandbox(faults={"Run": "panic"}).detach(NAME, BUSYBOX)
    try:
        async with Sandbox.connect(NAME) as sb:
            with pytest.raises(pykata.GuestPanicError, match="panicked") as caught:
                await sb.run(BUSYBOX, ["true"])
            assert "Kernel panic" in caught.value.console
        ended = await handle.wait()
        assert (ended.phase, ended.reason) == ("ended", "vm_died")
        assert "panicked" in ended.why
    finally:
        await gone(NAME)


async def test_a_killed_keeper_is_seen_and_its_name_is_free_after_gc() -> None:
    handle = await sandbox().detach(NAME, BUSYBOX, ["sleep", "1000"])
    assert handle.keeper is not None
    async with Sandbox.connect(NAME) as sb:
        os.kill(handle.keeper, signal.SIGKILL)
        with pytest.raises(VMDiedError, match="without a word"):
            await sb.run(BUSYBOX, ["true"])
    lost = await handle.wait()
    assert (lost.phase, list_detached()) == ("lost", [lost])
    for attempt in (handle.stop(), handle.kill(), connect_once(NAME)):
        with pytest.raises(DetachedLostError, match="keeper"):
            await attempt
    with pytest.raises(DetachedTakenError, match="killed") as taken:
        await sandbox().detach(NAME, BUSYBOX)
    assert taken.value.hint == "pykata gc"
    removed = await collect_garbage()
    assert state_dir() / "sandboxes" / NAME in removed
    assert list_detached() == []
    async with detached():
        assert await collect_garbage() == []


async def test_a_keeper_that_is_told_to_end() -> None:
    handle = await sandbox().detach(NAME, BUSYBOX, ["sleep", "1000"])
    assert handle.keeper is not None
    os.kill(handle.keeper, signal.SIGTERM)
    assert (await handle.wait()).phase == "ended"
    await handle.remove()


# --- names ---


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a/b", "a b", "a\n", "ä", "x" * 64, ".hidden", None, 3])
async def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match="not a name"):
        await sandbox().detach(name)
    with pytest.raises(ConfigError, match="not a name"):
        find_detached(name)


async def test_unknown_names() -> None:
    with pytest.raises(DetachedNotFoundError, match="'nobody'") as caught:
        find_detached("nobody")
    assert caught.value.hint
    with pytest.raises(DetachedNotFoundError):
        await connect_once("nobody")


async def test_taken_names() -> None:
    async with detached("talk") as handle:
        await handle.wait()
        with pytest.raises(DetachedTakenError, match="has ended") as caught:
            await sandbox().detach(NAME)
        assert caught.value.hint == f"pykata rm {NAME}"
    async with detached() as handle:
        with pytest.raises(DetachedTakenError, match="is running"):
            await sandbox().detach(NAME)
        with pytest.raises(DetachedError, match="is running"):
            await handle.remove()


async def test_a_race_for_a_name_has_one_winner() -> None:
    won: list[Detached] = []
    taken: list[DetachedTakenError] = []

    async def race() -> None:
        try:
            won.append(await sandbox().detach(NAME, BUSYBOX))
        except DetachedTakenError as error:
            taken.append(error)

    try:
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(race)
        assert (len(won), len(taken)) == (1, 3)
    finally:
        await gone(NAME)


# --- what can't be started leaves nothing ---


async def test_errors_of_the_start_arrive_as_they_are() -> None:
    with pytest.raises(BootError, match="told to by a test"):
        await sandbox(faults={"boot": "die"}).detach(NAME, BUSYBOX)
    with pytest.raises(ImageNotFoundError) as caught:
        await sandbox().detach(NAME, "builtin:nothing")
    assert caught.value.reference == "builtin:nothing"
    with pytest.raises(ConfigError, match="needs an image"):
        await sandbox().detach(NAME, None, ["true"])
    assert list_detached() == []


async def test_options_that_cannot_be_handed_over() -> None:
    with pytest.raises(ConfigError, match="another process"):
        await Sandbox(FakeHypervisor(commands={"here": lambda process: talk(process)}), FakeFs()).detach(NAME)
    assert list_detached() == []


async def test_a_cancelled_start_leaves_nothing() -> None:
    for after in (0.0, 0.05, 0.2, 0.4):
        with anyio.move_on_after(after):
            await sandbox(faults={"boot": "hang"}).detach(NAME, BUSYBOX)
        assert list_detached() == []


async def test_a_keeper_killed_before_it_is_ready() -> None:
    errors: list[DetachedError] = []

    async def start() -> None:
        try:
            await sandbox(faults={"boot": "hang"}).detach(NAME, BUSYBOX)
        except DetachedError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
        while not [path for path in run_root().iterdir() if path.name[0] != "."]:  # noqa: ASYNC110  it tells nobody else
            await anyio.sleep(0.01)
        for pid in children():
            pidfd = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            await anyio.wait_readable(pidfd)        # its descriptors are closed before it is dead
            os.close(pidfd)
    assert "before the sandbox ran" in str(errors[0])
    assert list_detached() == []
    assert len(await collect_garbage()) == 1, "its run directory"


def children() -> list[int]:
    """Keepers: tests are the reapers of what they orphan."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids if b"pykata.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()]


# --- the state on disk ---


async def test_another_version_s_state() -> None:
    async with detached() as handle:
        pass
    with directories.claimed("old", directories.State(name="old", phase="running")) as claim:
        directory = claim.directory
    (directory.path / "state.json").write_text('{"version": 99}')
    try:
        with pytest.raises(DetachedError, match="version 99"):
            find_detached("old")
        assert list_detached() == []
    finally:
        directories.remove(directory)
    assert handle.name == NAME


async def test_a_long_path_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKATA_STATE", str(tmp_path / ("long" * 30)))
    async with detached("sleep", "1000"), Sandbox.connect(NAME) as sb:
        assert (await sb.main.run(["echo", "hello"])).ok


async def test_a_state_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chmod(tmp_path, 0o722)  # noqa: S103
    monkeypatch.setenv("PYKATA_STATE", str(tmp_path))
    with pytest.raises(pykata.NotPermittedError) as caught:
        list_detached()
    assert "PYKATA_STATE" in caught.value.hint


# --- logs ---


async def test_following_a_log() -> None:
    async with detached("talk") as handle:
        assert (await logged(handle, follow=True))["stdout"] == b"out\n"
    async with detached("stubborn") as handle, aclosing(handle.logs(follow=True)) as pieces:
        assert (await anext(pieces)).data == b"ready\n"
        await handle.kill()
        assert [piece async for piece in pieces] == []
