"""What ``run`` makes of a process: its reasons, its output at every kind of end, its callbacks."""

from __future__ import annotations

import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

import pykata.collect
from pykata import (
    AgentProtocolError,
    AgentTimeoutError,
    CommandFailedError,
    GuestPanicError,
    Sandbox,
    VMDiedError,
)
from pykata.agent.client import AgentClient
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess, FakeVM

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"
PIECE = 64 * 1024
TIMEOUT = 1.0
"""Seconds after which a command that would run for ever is ended. Nothing depends on how long that takes."""


async def talks_then_hangs(process: FakeProcess) -> int:
    process.ignores.add(signal.SIGTERM)
    await process.write(b"so far\n")
    await process.write_error(b"so bad\n")
    await anyio.sleep_forever()
    return 0


async def mixed(process: FakeProcess) -> int:
    """n pieces on each stream, in turn."""
    for number in range(int(process.args[1])):
        await process.write(bytes([number % 251]) * PIECE)
        await process.write_error(bytes([number % 241]) * 100)
    return 0


async def greedy(process: FakeProcess) -> int:
    await process.write(b"before\n")
    process.kill(signal.SIGKILL, oom=True)
    await anyio.sleep_forever()
    return 0


async def crashes(process: FakeProcess) -> int:
    await process.write(b"before\n")
    process.kill(signal.SIGSEGV)
    await anyio.sleep_forever()
    return 0


async def deaf(process: FakeProcess) -> int:
    """Never reads its input."""
    await process.write(b"no thanks\n")
    return 3


COMMANDS = {
    "talks": talks_then_hangs, "mixed": mixed, "greedy": greedy, "crashes": crashes, "deaf": deaf,
}  # fmt: skip


@pytest.fixture
def faults() -> dict[Any, Any]:
    """When the machine fails, and how; may be changed while it runs."""
    return {}


@pytest.fixture
async def sb(faults: dict[Any, Any]) -> AsyncIterator[Sandbox]:
    async with Sandbox(FakeHypervisor(commands=COMMANDS, faults=faults), FakeFs()) as sandbox:
        yield sandbox


@pytest.fixture
def vm(sb: Sandbox) -> FakeVM:
    hypervisor = sb.options.hypervisor
    assert isinstance(hypervisor, FakeHypervisor)
    return hypervisor.machines[-1]


Run = Callable[..., Awaitable[pykata.Completed]]


@pytest.fixture(params=["sandbox", "container"])
async def run(request: pytest.FixtureRequest, sb: Sandbox) -> AsyncIterator[Run]:
    """``sb.run`` of an image, and ``container.run``: what is said of one holds for the other."""
    if request.param == "sandbox":
        yield lambda *args, **kwargs: sb.run(BUSYBOX, *args, **kwargs)
        return
    async with sb.container(BUSYBOX) as container:
        yield container.run


# --- reasons ---


async def test_exit(run: Run) -> None:
    done = await run(["false"])
    assert (done.reason, done.exit_code, done.signal, done.ok) == ("exit", 1, None, False)


async def test_signal(run: Run) -> None:
    done = await run(["crashes"])
    assert (done.reason, done.exit_code, done.signal, done.stdout) == ("signal", 139, 11, "before\n")
    with pytest.raises(CommandFailedError, match="'crashes' was ended by SIGSEGV"):
        done.check()


async def test_out_of_memory(run: Run) -> None:
    done = await run(["greedy"])
    assert (done.reason, done.exit_code, done.signal, done.stdout) == ("oom", 137, 9, "before\n")
    with pytest.raises(CommandFailedError, match="memory ran out"):
        done.check()


async def test_timeout_keeps_the_output_and_kills(run: Run, vm: FakeVM) -> None:
    done = await run(["talks"], timeout=TIMEOUT)
    assert (done.reason, done.exit_code, done.signal) == ("timeout", 137, 9)
    assert (done.stdout, done.stderr) == ("so far\n", "so bad\n")
    assert not any(container.processes for container in vm.agent.containers.values())
    with pytest.raises(CommandFailedError, match="time was up") as caught:
        done.check()
    assert caught.value.completed is done
    assert (await run(["true"], timeout=60)).reason == "exit"


async def test_a_timeout_of_what_never_stops_writing(run: Run) -> None:
    done = await run(["yes"], timeout=TIMEOUT, max_output=1000)
    assert (done.reason, done.truncated, len(done.stdout_bytes)) == ("timeout", True, 1000)


async def test_the_sandbox_s_timeout_is_the_default(faults: dict[Any, Any]) -> None:
    async with Sandbox(FakeHypervisor(commands=COMMANDS), FakeFs(), timeout=TIMEOUT) as sandbox:
        assert (await sandbox.run(BUSYBOX, ["talks"])).reason == "timeout"
        assert (await sandbox.run(BUSYBOX, ["sleep", "0"], timeout=60)).reason == "exit"
        async with sandbox.container(BUSYBOX) as container:
            assert (await container.run(["talks"])).reason == "timeout"
            assert (await container.run(["sleep", "0"], timeout=60)).reason == "exit"


@pytest.mark.parametrize(("end", "error"), [("die", VMDiedError), ("panic", GuestPanicError)])
async def test_the_machine_s_death_keeps_the_output(
    run: Run, vm: FakeVM, end: str, error: type[VMDiedError]
) -> None:
    seen: list[bytes] = []

    def look(data: bytes) -> None:
        seen.append(data)
        getattr(vm, end)()

    done = await run(["talks"], on_stderr=look)
    assert (done.reason, done.exit_code, done.signal, done.stdout) == ("vm_died", None, None, "so far\n")
    assert type(done.error) is error
    assert done.error.console
    assert seen == [b"so bad\n"]
    with pytest.raises(CommandFailedError, match="ended with its virtual machine") as caught:
        done.check()
    assert caught.value.__cause__ is done.error
    with pytest.raises(error):
        await run(["true"])


async def test_an_agent_that_fails_keeps_the_output(sb: Sandbox) -> None:
    def cut(data: bytes) -> None:
        sb._open.agent._channel.fail(AgentProtocolError, "it said what it must not")

    with pytest.raises(AgentProtocolError) as caught:
        await sb.run(BUSYBOX, ["talks"], on_stderr=cut)
    assert caught.value.completed is not None
    assert (caught.value.completed.stdout, caught.value.completed.stderr) == ("so far\n", "so bad\n")
    with pytest.raises(AgentProtocolError) as later:
        await sb.run(BUSYBOX, ["true"])
    assert later.value.completed is None, "that was another command's"


async def test_check_of_a_dead_machine_is_a_failed_command(run: Run, vm: FakeVM) -> None:
    with pytest.raises(CommandFailedError) as caught:
        await run(["talks"], on_stderr=lambda _: vm.die(), check=True)
    assert caught.value.completed.stdout == "so far\n"


@pytest.mark.parametrize("moment", ["plug", "Run", "CreateContainer", "RemoveContainer", "unplug"])
@pytest.mark.parametrize(("fault", "error"), [("die", VMDiedError), ("panic", GuestPanicError)])
async def test_a_machine_that_dies_before_the_command_runs(
    sb: Sandbox, faults: dict[Any, Any], moment: str, fault: str, error: type[VMDiedError]
) -> None:
    faults[moment] = fault

    async def use() -> pykata.Completed:
        if moment not in ("CreateContainer", "RemoveContainer"):
            return await sb.run(BUSYBOX, ["echo", "hi"])
        async with sb.container(BUSYBOX) as container:
            return await container.run(["echo", "hi"])

    if moment in ("RemoveContainer", "unplug"):
        assert (await use()).stdout == "hi\n", "the command had ended, and its result is whole"
    else:
        with pytest.raises(error):
            await use()
    await sb._open.settled()
    faults.clear()
    with pytest.raises(error):
        await sb.run(BUSYBOX, ["true"])


# --- a guest that doesn't answer ---


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of the agent's calls that a test can wait for."""
    for call in ("setup", "create_container", "remove_container", "signal"):
        monkeypatch.setitem(getattr(AgentClient, call).__kwdefaults__, "timeout", 2 * TIMEOUT)
    monkeypatch.setattr(pykata.collect, "KILL_GRACE", 2 * TIMEOUT)


@pytest.mark.usefixtures("impatient")
async def test_a_timeout_in_a_guest_that_hangs_has_its_output_and_breaks_the_sandbox() -> None:
    async with Sandbox(FakeHypervisor(commands=COMMANDS, faults={"Signal": "hang"}), FakeFs()) as sandbox:
        done = await sandbox.run(BUSYBOX, ["talks"], timeout=TIMEOUT)
        assert (done.reason, done.exit_code, done.stdout) == ("timeout", None, "so far\n")
        with pytest.raises(AgentTimeoutError, match="Signal"):
            await sandbox.run(BUSYBOX, ["true"])


@pytest.mark.usefixtures("impatient")
async def test_a_container_that_cannot_be_removed_breaks_the_sandbox() -> None:
    async with Sandbox(FakeHypervisor(faults={"RemoveContainer": "hang"}), FakeFs()) as sandbox:
        async with sandbox.container(BUSYBOX) as container:
            assert (await container.run(["echo", "hi"])).stdout == "hi\n"
        with pytest.raises(AgentTimeoutError, match="RemoveContainer"):
            await sandbox.run(BUSYBOX, ["true"])


@pytest.mark.usefixtures("impatient")
async def test_a_container_that_cannot_be_made() -> None:
    async with Sandbox(FakeHypervisor(faults={"CreateContainer": "hang"}), FakeFs()) as sandbox:
        with pytest.raises(AgentTimeoutError, match="CreateContainer"):
            async with sandbox.container(BUSYBOX):
                raise AssertionError("there is a container")
        assert (await sandbox.run(BUSYBOX, ["echo", "usable"])).stdout == "usable\n"


# --- output ---


async def test_both_streams_whole_and_apart(run: Run) -> None:
    done = await run(["mixed", "300"])
    assert done.stdout_bytes == b"".join(bytes([number % 251]) * PIECE for number in range(300))
    assert done.stderr_bytes == b"".join(bytes([number % 241]) * 100 for number in range(300))
    assert not done.truncated


@pytest.mark.parametrize("limit", [0, 1, PIECE - 1, PIECE, PIECE + 1])
async def test_output_beyond_the_limit_is_read_but_not_kept(run: Run, limit: int) -> None:
    heard = 0

    def count(data: bytes) -> None:
        nonlocal heard
        heard += len(data)

    done = await run(["mixed", "4"], max_output=limit, on_stdout=count)
    assert done.ok, "it wasn't stopped by it"
    assert done.stdout_bytes == b"".join(bytes([number]) * PIECE for number in range(4))[:limit]
    assert done.truncated
    assert heard == 4 * PIECE, "a callback hears all"


async def test_output_of_just_the_limit_is_not_truncated(run: Run) -> None:
    done = await run(["mixed", "2"], max_output=2 * PIECE)
    assert len(done.stdout_bytes) == 2 * PIECE
    assert not done.truncated


async def test_callbacks_hear_everything_in_order(run: Run) -> None:
    heard: list[tuple[str, bytes]] = []

    async def stderr(data: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        heard.append(("err", data))

    done = await run(["mixed", "5"], on_stdout=lambda data: heard.append(("out", data)), on_stderr=stderr)
    assert b"".join(data for kind, data in heard if kind == "out") == done.stdout_bytes
    assert b"".join(data for kind, data in heard if kind == "err") == done.stderr_bytes


@pytest.mark.parametrize("stream", ["on_stdout", "on_stderr"])
async def test_a_callback_s_error_ends_the_command_and_is_itself(run: Run, vm: FakeVM, stream: str) -> None:
    def fail(data: bytes) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await run(["talks"], **{stream: fail})
    while any(container.processes for container in vm.agent.containers.values()):
        await anyio.lowlevel.checkpoint()
    assert (await run(["true"])).ok


@pytest.mark.usefixtures("impatient")
async def test_a_callback_that_never_returns_does_not_outlast_the_timeout(run: Run) -> None:
    async def stuck(data: bytes) -> None:
        await anyio.sleep_forever()

    done = await run(["talks"], timeout=TIMEOUT, on_stdout=stuck)
    assert done.reason == "timeout"
    assert done.stdout == "so far\n"
    assert (await run(["echo", "usable"])).stdout == "usable\n"


async def test_a_callback_that_is_cut_off_loses_no_output_that_came(run: Run) -> None:
    # Both streams have much waiting when the time is up in the middle of a callback.
    calls = 0

    async def slow(data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            await anyio.sleep_forever()

    done = await run(["mixed", "12"], timeout=2 * TIMEOUT, on_stdout=slow)
    whole = b"".join(bytes([number % 251]) * PIECE for number in range(12))
    assert done.stdout_bytes == whole[: len(done.stdout_bytes)]
    assert done.stderr_bytes == b"".join(bytes([number]) * 100 for number in range(12))[: len(done.stderr_bytes)]
    assert len(done.stdout_bytes) >= 3 * PIECE


# --- input ---


async def test_much_input_and_output_at_once(run: Run) -> None:
    data = bytes(range(256)) * 32 * 1024        # 8 MiB: more than all the windows and buffers in between
    done = await run(["cat"], input=data)
    assert done.stdout_bytes == data


async def test_input_that_nobody_reads(run: Run) -> None:
    done = await run(["deaf"], input=b"x" * 8 * 1024 * 1024)
    assert (done.exit_code, done.stdout) == (3, "no thanks\n")


async def test_input_to_a_machine_that_dies(run: Run, vm: FakeVM, caplog: pytest.LogCaptureFixture) -> None:
    done = await run(["talks"], input=b"x" * 8 * 1024 * 1024, on_stderr=lambda _: vm.die())
    assert (done.reason, done.stdout) == ("vm_died", "so far\n")
    gc.collect()
    await anyio.lowlevel.checkpoint()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []
