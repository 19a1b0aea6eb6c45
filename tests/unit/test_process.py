"""A process over fakes: streams both ways, signals, its end, and the ends of everything around it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
import pytest

from pykata import ConfigError, GuestPanicError, Process, Sandbox, SandboxClosedError, VMDiedError
from pykata.agent import v1
from pykata.requests import WINDOW
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess, FakeVM
from tests.settling import settled

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"
PIECE = 64 * 1024


async def upper(process: FakeProcess) -> int:
    while data := await process.read():
        await process.write(data.upper())
        await process.write_error(b".")
    return 7


async def stubborn(process: FakeProcess) -> int:
    process.ignores.add(signal.SIGTERM)
    await process.write(b"ready\n")
    await anyio.sleep_forever()
    return 0


async def flood(process: FakeProcess) -> int:
    """Writes n pieces to stderr, one word to stdout in the middle."""
    pieces = int(process.args[1])
    for number in range(pieces):
        await process.write_error(bytes([number % 256]) * PIECE)
        if number == pieces // 2:
            await process.write(b"half")
    return 0


async def counts(process: FakeProcess) -> int:
    for number in range(int(process.args[1])):
        await process.write(b"%d\n" % number)
    return 0


async def length(process: FakeProcess) -> int:
    """Reads everything before it says a word."""
    size = 0
    while data := await process.read():
        size += len(data)
    await process.write(b"%d" % size)
    return 0


COMMANDS = {"upper": upper, "stubborn": stubborn, "flood": flood, "counts": counts, "length": length}


@pytest.fixture
def hypervisor() -> FakeHypervisor:
    return FakeHypervisor(commands=COMMANDS)


@pytest.fixture
async def sb(hypervisor: FakeHypervisor) -> AsyncIterator[Sandbox]:
    async with Sandbox(hypervisor, FakeFs()) as sandbox:
        yield sandbox


@pytest.fixture
def vm(sb: Sandbox, hypervisor: FakeHypervisor) -> FakeVM:
    return hypervisor.machines[-1]


# --- streams ---


async def test_a_conversation(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["upper"]) as process:
        assert process.args == ("upper",)
        assert process.pid > 0
        assert process.returncode is None
        for word in (b"one", b"two"):
            await process.stdin.send(word)
            assert await anext(process.stdout) == word.upper()
        await process.stdin.aclose()
        assert [piece async for piece in process.stdout] == []
        assert await process.stderr.read() == b".."
        assert await process.wait() == 7
        assert process.returncode == 7
        assert process.ended


async def test_output_that_nobody_read_is_there_after_the_end(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["counts", "100"]) as process:
        assert await process.wait() == 0
        assert await process.stdout.read() == b"".join(b"%d\n" % number for number in range(100))
        assert await process.stdout.read() == b""
        assert await process.stderr.read() == b""
    # What has arrived belongs to the caller, also when the block was left.
    async with sb.process(BUSYBOX, ["counts", "3"]) as process:
        await process.wait()
    assert await process.stdout.read() == b"0\n1\n2\n"


async def test_both_streams_read_by_tasks_of_their_own(sb: Sandbox) -> None:
    got: dict[str, bytes] = {}

    async def read(process: Process, name: str) -> None:
        got[name] = await getattr(process, name).read()

    async with sb.process(BUSYBOX, ["flood", "64"]) as process, anyio.create_task_group() as group:
        for name in ("stdout", "stderr"):
            group.start_soon(read, process, name)
        group.start_soon(process.wait)
    assert got == {"stdout": b"half", "stderr": b"".join(bytes([number]) * PIECE for number in range(64))}


@pytest.mark.parametrize("readers", [0, 1, 2, 3])
async def test_input_goes_on_while_others_wait_for_output(sb: Sandbox, readers: int) -> None:
    # More than its window, of which the news come to whichever task happens to read.
    async with sb.process(BUSYBOX, ["length"]) as process, anyio.create_task_group() as tasks:
        waits: list[Callable[[], Coroutine[Any, Any, Any]]] = [process.wait, process.stderr.read, process.wait]
        for wait in waits[:readers]:
            tasks.start_soon(wait)
        await settled()
        with anyio.fail_after(300):
            for _ in range(20):
                await process.stdin.send(b"x" * PIECE)
            await process.stdin.aclose()
            assert await process.stdout.read() == b"%d" % (20 * PIECE)


async def test_a_stream_nobody_reads_stops_the_process_and_costs_bounded_memory(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["yes"]) as process:
        waiting = asyncio.create_task(process.wait())
        await settled()
        held = sum(len(piece) for piece in iter(process.stdout.take, b""))
        assert held == WINDOW
        # Room was made, so it goes on.
        assert await anext(process.stdout)
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_unread_output_does_not_stop_another_process(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["yes"]) as stuck:
        waiting = asyncio.create_task(stuck.wait())
        await settled()
        assert (await sb.run(BUSYBOX, ["echo", "through"])).stdout == "through\n"
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_a_cancelled_read_loses_nothing(sb: Sandbox) -> None:
    got = bytearray()
    async with sb.process(BUSYBOX, ["counts", "2000"]) as process:
        while not process.ended:
            # Cancelled again and again, wherever it is.
            with anyio.move_on_after(0):
                await process.wait()
            reading = asyncio.create_task(anext(process.stdout, b""))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
            if not reading.cancelled():
                got += reading.result()
            while piece := process.stdout.take():
                got += piece
            with anyio.move_on_after(0.001):
                await process.advance(lambda: False)
        got += await process.stdout.read()
    assert got == b"".join(b"%d\n" % number for number in range(2000))


async def test_input_to_a_process_that_does_not_want_it_is_gone(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["true"]) as process:
        await process.stdin.send(b"x" * 4 * 1024 * 1024)
        assert await process.wait() == 0
        await process.stdin.send(b"more")
        await process.stdin.aclose()
        await process.stdin.aclose()


# --- signals ---


async def test_signals_by_name(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["sleep", "infinity"]) as process:
        await process.terminate()
        assert await process.wait() == 128 + signal.SIGTERM
        assert process.exited is not None
        assert process.exited.signal == signal.SIGTERM


async def test_kill_reaches_what_ignores_terminate(sb: Sandbox, vm: FakeVM) -> None:
    async with sb.process(BUSYBOX, ["stubborn"]) as process:
        assert await anext(process.stdout) == b"ready\n"
        await process.terminate()
        await process.kill()
        assert await process.wait() == 128 + signal.SIGKILL
    scopes = [request.scope for request in vm.agent.requests if isinstance(request, v1.SignalRequest)]
    assert scopes == [v1.SignalRequestScope.GROUP, v1.SignalRequestScope.TREE]


async def test_a_signal_to_what_has_ended_is_nothing(sb: Sandbox, vm: FakeVM) -> None:
    async with sb.process(BUSYBOX, ["true"]) as process:
        # Ended in the guest; the news is on its way, and the agent doesn't know the process any more.
        while any(container.processes for container in vm.agent.containers.values()):
            await anyio.lowlevel.checkpoint()
        assert not process.ended
        await process.send_signal(signal.SIGINT)
        await process.kill()
        await process.wait()
        await process.terminate()
        await process.kill()
    await process.kill()


async def test_an_impossible_signal_is_refused(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["sleep", "infinity"]) as process:
        for wrong in (99, 0, -9, 2**32 + 9, True, None, "TERM", 1.5):
            with pytest.raises(ConfigError, match="signal"):
                await process.send_signal(wrong)  # type: ignore[arg-type]
        assert process.returncode is None
        await process.send_signal(signal.Signals.SIGKILL)
        assert await process.wait() == 128 + signal.SIGKILL


# --- ends ---


async def test_leaving_the_block_kills_it(sb: Sandbox, vm: FakeVM) -> None:
    async with sb.process(BUSYBOX, ["stubborn"]) as process:
        pass
    assert vm.agent.containers == {}
    assert vm.plugged == {}
    assert process.returncode is None
    for use in (process.wait, process.stdout.read, process.stderr.__anext__):
        with pytest.raises(SandboxClosedError, match="process is gone"):
            await use()


async def test_leaving_the_block_wakes_who_still_reads(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["sleep", "infinity"]) as process:
        readers = [asyncio.create_task(use) for use in (process.wait(), process.stdout.read(), process.stderr.read())]
        await settled()
    done, _ = await asyncio.wait(readers)
    assert [type(task.exception()) for task in done] == [SandboxClosedError] * 3


async def test_leaving_the_block_wakes_who_waits_for_room(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["yes"]) as process:
        waiting = asyncio.create_task(process.wait())
        await settled()
    await asyncio.wait([waiting])
    assert isinstance(waiting.exception(), SandboxClosedError)


async def test_an_error_in_the_block_kills_it_and_is_itself(sb: Sandbox, vm: FakeVM) -> None:
    async def fail() -> None:
        async with sb.process(BUSYBOX, ["sleep", "infinity"]):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await fail()
    assert vm.agent.containers == {}


async def test_a_kept_container_survives_its_processes(sb: Sandbox, vm: FakeVM) -> None:
    async with sb.container(BUSYBOX) as container:
        async with container.process(["sleep", "infinity"]):
            pass
        while vm.agent.containers[container.id].processes:
            await anyio.lowlevel.checkpoint()
        assert (await container.run(["echo", "still here"])).stdout == "still here\n"


@pytest.mark.parametrize(("end", "error"), [("die", VMDiedError), ("panic", GuestPanicError)])
async def test_the_machine_s_end_reaches_everybody(
    sb: Sandbox, vm: FakeVM, end: str, error: type[VMDiedError]
) -> None:
    async def use() -> None:
        async with sb.process(BUSYBOX, ["upper"]) as process, anyio.create_task_group():
            readers = [
                asyncio.create_task(use) for use in (process.wait(), process.stdout.read(), process.stderr.read())
            ]
            await settled()
            getattr(vm, end)()
            done, _ = await asyncio.wait(readers)
            assert [type(task.exception()) for task in done] == [error] * 3
            with pytest.raises(error):
                await process.stdin.send(b"anybody?")
            with pytest.raises(error):
                await process.kill()

    await use()
    with pytest.raises(error) as caught:
        await sb.run(BUSYBOX, ["true"])
    assert "Linux version" in caught.value.console


async def test_a_traceback_does_not_grow_with_each_use_of_a_broken_sandbox(sb: Sandbox, vm: FakeVM) -> None:
    def depth(error: BaseException) -> int:
        count, trace = 0, error.__traceback__
        while trace is not None:
            count, trace = count + 1, trace.tb_next
        return count

    async def fail() -> VMDiedError:
        with pytest.raises(VMDiedError) as caught:
            await sb.run(BUSYBOX, ["true"])
        return caught.value

    vm.die()
    await fail()
    first = depth(await fail())
    for _ in range(5):
        last = depth(await fail())
    assert last == first
