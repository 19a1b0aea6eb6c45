"""Machines that die or hang while they are used: each a typed error, in time, naming its part. Nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import pytest

from pykata import (
    AgentLostError,
    AgentTimeoutError,
    Bundle,
    CommandFailedError,
    GuestPanicError,
    Sandbox,
    VMDiedError,
    VMError,
)
from pykata.agent import v1
from pykata.agent.channel import Channel
from pykata.agent.client import AgentClient
from pykata.requests import container_request

BUSYBOX = "builtin:busybox"
GUARD = 300.0
"""Seconds in which everything here is over, also on a busy machine; what hangs, hangs for longer."""


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


def pid_of(sandbox: Sandbox) -> int:
    assert sandbox._running is not None
    return sandbox._running.vm.pid


def both(act: Callable[[], None]) -> Callable[[str], None]:
    """To be told what was heard of: acts after both streams; which of the two comes first isn't said."""
    outputs: set[str] = set()

    def heard(output: str) -> None:
        outputs.add(output)
        if len(outputs) == 2:
            act()

    return heard


# --- a machine that dies ---


async def test_killed_in_the_middle_of_a_command(bundle: Bundle) -> None:
    async with Sandbox(isolation="emulated") as other, Sandbox(isolation="emulated") as sandbox:
        with anyio.fail_after(GUARD):
            heard = both(lambda: os.kill(pid_of(sandbox), signal.SIGKILL))
            done = await sandbox.run(
                BUSYBOX, sh("echo so far; echo so bad >&2; exec sleep 1000"),
                on_stdout=lambda _: heard("stdout"), on_stderr=lambda _: heard("stderr"),
            )  # fmt: skip
        assert (done.reason, done.exit_code, done.signal) == ("vm_died", None, None)
        assert (done.stdout, done.stderr) == ("so far\n", "so bad\n")
        assert type(done.error) is VMDiedError
        assert "SIGKILL" in str(done.error)
        with pytest.raises(CommandFailedError, match="SIGKILL"):
            done.check()
        with pytest.raises(VMDiedError, match="SIGKILL"):
            await sandbox.run(BUSYBOX, ["true"])
        with pytest.raises(VMDiedError, match="SIGKILL"):
            async with sandbox.container(BUSYBOX):
                raise AssertionError("there is a container")
        assert (await other.run(BUSYBOX, ["echo", "unharmed"])).stdout == "unharmed\n"
    async with Sandbox(isolation="emulated") as sandbox:
        assert (await sandbox.run(BUSYBOX, ["echo", "a new one works"])).stdout == "a new one works\n"


async def test_killed_while_nothing_runs(bundle: Bundle) -> None:
    async with Sandbox(isolation="emulated") as sandbox:
        os.kill(pid_of(sandbox), signal.SIGKILL)
        with anyio.fail_after(GUARD), pytest.raises(VMDiedError, match="SIGKILL"):
            await sandbox.run(BUSYBOX, ["true"])


async def test_killed_with_containers_and_processes_open(bundle: Bundle) -> None:
    async def use(sandbox: Sandbox) -> None:
        async with sandbox.container(BUSYBOX) as container, container.process(["cat"]) as process:
            readers = [asyncio.create_task(coro) for coro in (process.wait(), process.stdout.read())]
            await process.stdin.send(b"x")
            os.kill(pid_of(sandbox), signal.SIGKILL)
            done, _ = await asyncio.wait(readers)
            assert [type(task.exception()) for task in done] == [VMDiedError] * 2
            with pytest.raises(VMDiedError):
                await process.stdin.send(b"x")
            with pytest.raises(VMDiedError):
                await container.run(["true"])
            raise KeyError("the block's own error is what leaves it")

    async with Sandbox(isolation="emulated") as sandbox:
        with anyio.fail_after(GUARD), pytest.raises(KeyError):
            await use(sandbox)


async def test_killed_with_many_commands_under_way(bundle: Bundle) -> None:
    ends: list[str] = []

    async def run(sandbox: Sandbox, started: anyio.Event) -> None:
        try:
            done = await sandbox.run(BUSYBOX, sh("echo x; exec sleep 1000"), on_stdout=lambda _: started.set())
            ends.append(done.reason)
        except VMDiedError:
            ends.append("before it started")

    with anyio.fail_after(GUARD):
        async with Sandbox(isolation="emulated") as sandbox, anyio.create_task_group() as group:
            started = anyio.Event()
            for _ in range(8):
                group.start_soon(run, sandbox, started)
            await started.wait()
            os.kill(pid_of(sandbox), signal.SIGKILL)
    assert len(ends) == 8
    assert "vm_died" in ends
    assert set(ends) <= {"vm_died", "before it started"}


async def test_a_panic_in_the_middle_of_a_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    # A container can't reach what makes the kernel panic. One that is made with a writable /proc/sys can.
    def reckless(*args: Any) -> v1.CreateContainerRequest:
        request = container_request(*args)
        request.oci_spec = b'{"linux": {"readonlyPaths": []}}'
        return request

    monkeypatch.setattr("pykata.requests.container_request", reckless)
    async with Sandbox(isolation="emulated", disk="8M") as sandbox:
        script = "echo so far; echo 2 > /proc/sys/vm/panic_on_oom; exec tail /dev/zero"
        with anyio.fail_after(GUARD):
            done = await sandbox.run(BUSYBOX, sh(script))
        assert (done.reason, done.stdout) == ("vm_died", "so far\n")
        assert isinstance(done.error, GuestPanicError)
        assert "panic_on_oom" in str(done.error)
        assert "Kernel panic - not syncing: Out of memory" in done.error.console
        assert "Kernel panic" in sandbox.console
        with pytest.raises(GuestPanicError):
            await sandbox.run(BUSYBOX, ["true"])


async def test_the_agent_ends_in_the_middle_of_a_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an agent that gives up this is all that is seen; one that dies is a panic of its kernel, too."""
    sockets: list[socket.socket] = []
    over = Channel.over.__func__        # type: ignore[attr-defined]

    async def noted(cls: type[Channel], /, sock: socket.socket, **options: Any) -> Channel:
        sockets.append(sock)
        return await over(cls, sock, **options)     # type: ignore[no-any-return]

    monkeypatch.setattr(Channel, "over", classmethod(noted))
    monkeypatch.setattr("pykata.running.DEATH_NOTICE", 1.0)
    async with Sandbox(isolation="emulated") as other:
        sockets.clear()
        async with Sandbox(isolation="emulated", template="off") as sandbox:
            (agent,) = sockets
            script = sh("echo so far; echo so bad >&2; exec sleep 1000")
            heard = both(lambda: agent.shutdown(socket.SHUT_RDWR))
            with anyio.fail_after(GUARD), pytest.raises(AgentLostError) as caught:
                await sandbox.run(
                    BUSYBOX, script, on_stdout=lambda _: heard("stdout"), on_stderr=lambda _: heard("stderr"))
            assert caught.value.completed is not None
            assert (caught.value.completed.stdout, caught.value.completed.stderr) == ("so far\n", "so bad\n")
            with pytest.raises(AgentLostError):
                await sandbox.run(BUSYBOX, ["true"])
        assert (await other.run(BUSYBOX, ["echo", "unharmed"])).stdout == "unharmed\n"


# --- a machine that hangs ---


End = Callable[[Sandbox, signal.Signals], None]


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch) -> End:
    """Sends a signal to the machine, with deadlines of seconds in place of tens of seconds from then on."""
    return partial(_end, monkeypatch)


def _end(monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox, number: signal.Signals) -> None:
    os.kill(pid_of(sandbox), number)
    for call in ("create_container", "remove_container", "signal", "run"):
        function = getattr(AgentClient, call)
        defaults = getattr(function, "__wrapped__", function).__kwdefaults__
        monkeypatch.setitem(defaults, "timeout", 2.0)
    monkeypatch.setattr("pykata.hypervisors.qemu.qmp.PATIENCE", 2.0)
    monkeypatch.setattr("pykata.running.DEATH_NOTICE", 1.0)


async def test_stopped_in_the_middle_of_a_command(bundle: Bundle, end: End) -> None:
    with anyio.fail_after(GUARD):
        async with Sandbox(isolation="emulated") as sandbox:
            for seconds in (1, 10, 60):         # a slow machine takes its time to begin
                done = await sandbox.run(
                    BUSYBOX, sh("echo so far; exec sleep 1000"), timeout=seconds,
                    on_stdout=lambda _: end(sandbox, signal.SIGSTOP),
                )  # fmt: skip
                if done.stdout:
                    break
            assert (done.reason, done.exit_code, done.stdout) == ("timeout", None, "so far\n")
            with pytest.raises(AgentTimeoutError, match="Signal within 2 s"):
                await sandbox.run(BUSYBOX, ["true"])


async def test_stopped_while_nothing_runs(bundle: Bundle, end: End) -> None:
    with anyio.fail_after(GUARD):
        async with Sandbox(isolation="emulated") as sandbox:
            end(sandbox, signal.SIGSTOP)
            with pytest.raises(VMError, match="QEMU didn't answer"):
                await sandbox.run(BUSYBOX, ["true"])


async def test_stopped_with_a_container_open(bundle: Bundle, end: End) -> None:
    with anyio.fail_after(GUARD):
        async with Sandbox(isolation="emulated") as sandbox:
            async with sandbox.container(BUSYBOX) as container:
                end(sandbox, signal.SIGSTOP)
                with pytest.raises(AgentTimeoutError):
                    await container.run(["true"])
            with pytest.raises(AgentTimeoutError):
                await sandbox.run(BUSYBOX, ["true"])


async def test_stopped_and_continued_is_only_slow(bundle: Bundle) -> None:
    async with Sandbox(isolation="emulated") as sandbox, sandbox.process(BUSYBOX, ["cat"]) as process:
        os.kill(pid_of(sandbox), signal.SIGSTOP)
        await process.stdin.send(b"patience\n")
        os.kill(pid_of(sandbox), signal.SIGCONT)
        assert await anext(process.stdout) == b"patience\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
async def test_cancelled_when_the_machine_is_gone(bundle: Bundle, end: End, number: signal.Signals) -> None:
    with anyio.fail_after(GUARD):
        async with Sandbox(isolation="emulated") as sandbox:
            def heard(data: bytes) -> None:
                end(sandbox, number)
                running.cancel()

            command = sandbox.run(BUSYBOX, sh("echo x; exec sleep 1000"), on_stdout=heard)
            running = asyncio.create_task(command)
            await asyncio.wait([running])
            assert running.cancelled()
