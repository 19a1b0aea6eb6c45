"""Sandboxes that go on from a running one, and from one on disk."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import pytest
from attrs import evolve

from pykata import Container, Sandbox, SandboxClosedError
from pykata.ahead import NextFork, Waiting
from pykata.errors import ConfigError, HostError, SavedDamagedError, SavedMissingError
from pykata.net.network import Network
from pykata.running import Running
from pykata.spec import Disk
from tests.cancellation import Way, cancel_everywhere
from tests.vm.conftest import BUSYBOX, clocked

COUNTING = "trap 'echo told >> /told' USR1; i=0; while :; do i=$((i+1)); echo $i >> /count; echo $i; sleep 0.1; done"

TELL = "cat /file /run/pykata/generation; hostname; until [ -s /told ]; do sleep 0.1; done; cat /told"


async def goes_on(container: Container, log: str) -> None:
    """What writes numbered lines into this file has written another one."""
    wait = f"last=$(tail -n 1 {log}); until [ \"$(tail -n 1 {log})\" != \"$last\" ]; do sleep 0.1; done"
    await container.run(["sh", "-c", wait], timeout=600, check=True)


ENV = "echo $SECRET.$OWN"


def sandbox(**options: object) -> Sandbox:
    return Sandbox(isolation="emulated", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", ["auto", "off"])
async def test_processes_go_on_in_all(template: str) -> None:
    async with (
        sandbox(template=template) as parent, parent.container(BUSYBOX) as c,
        c.process(["sh", "-c", COUNTING]) as counting, AsyncExitStack() as stack,
    ):  # fmt: skip
        lines = aiter(counting.stdout.lines())
        seen = [int(await anext(lines))]
        await c.run(["sh", "-c", "echo parents > /file"])
        children = await parent.fork(2, signal=10)
        for child in children:
            await stack.enter_async_context(child)
            assert child.timings.start == "fork"
            inside = child.containers[c.id]
            done = await inside.run(["sh", "-c", TELL])
            file, generation, name, told = done.stdout.split()
            assert (file, told) == ("parents", "told")
            assert int(generation) > 0
            assert name == child.options.hostname != parent.options.hostname
            await goes_on(inside, "/count")
            assert await clocked(inside, ":") == []
        assert (await c.run(["ls", "/told"])).exit_code != 0        # nobody told the parent's
        last = int((await c.run(["tail", "-n", "1", "/count"])).stdout)
        # Its output is the parent's still, and whole.
        while seen[-1] < last:
            seen.append(int(await anext(lines)))
        assert seen == list(range(1, last + 1))


async def test_a_child_outlives_its_parent_and_has_children() -> None:
    async with AsyncExitStack() as stack:
        async with sandbox(env={"SECRET": "1"}) as parent, parent.container(BUSYBOX) as c:
            assert (await c.run(["sh", "-c", "echo 1 > /file; echo $SECRET"])).stdout == "1\n"
            (child,) = await parent.fork(env={"OWN": "2"})
            (late,) = await parent.fork()
            await stack.enter_async_context(child)
        with pytest.raises(SandboxClosedError, match="was left"):       # the number of its file may be another's by now
            async with late:
                pass
        inside = child.containers[c.id]
        for done in (await inside.run(["sh", "-c", ENV]), await child.run(BUSYBOX, ["sh", "-c", ENV])):
            assert done.stdout == ".2\n"
        await inside.run(["sh", "-c", "echo 2 >> /file"])
        (grandchild,) = await child.fork()
        async with grandchild:
            assert (await grandchild.containers[c.id].run(["cat", "/file"])).stdout == "1\n2\n"
            assert (await grandchild.run(BUSYBOX, ["echo", "new"])).stdout == "new\n"
        with pytest.raises(ConfigError, match="count=0"):
            await child.fork(0)
        for wrong in (65, -1, "USR1", True, 0.5):
            with pytest.raises(ConfigError, match="is not a signal"):
                await child.fork(signal=wrong)  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match="is not a signal"):
                Sandbox.restore("/nowhere", signal=wrong)  # type: ignore[arg-type]


async def test_a_snapshot_goes_on_later(tmp_path: Path) -> None:
    async with sandbox() as sb, sb.container(BUSYBOX) as c, c.process(["sh", "-c", COUNTING]) as counting:
        await anext(counting.stdout)
        await sb.snapshot(tmp_path / "saved")
        await c.run(["sh", "-c", "echo later > /later"])
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    shutil.rmtree(tmp_path / "saved")
    async with Sandbox.restore(tmp_path / "copy", isolation="emulated", signal=10) as again:
        assert again.timings.start == "snapshot"
        inside = again.containers[c.id]
        assert (await inside.run(["ls", "/later"])).exit_code != 0
        await goes_on(inside, "/count")
        assert await clocked(inside, "until [ -s /told ]; do sleep 0.1; done; cat /told") == ["told"]
    with pytest.raises(ConfigError, match="memory '256', here '128'"):
        async with Sandbox.restore(tmp_path / "copy", isolation="emulated", memory=128):
            pass
    (tmp_path / "copy" / "memory").write_bytes(b"")
    with pytest.raises(SavedDamagedError, match="memory has 0 bytes"):
        async with Sandbox.restore(tmp_path / "copy", isolation="emulated"):
            pass
    with pytest.raises(SavedMissingError):
        async with Sandbox.restore(tmp_path / "none", isolation="emulated"):
            pass


async def test_two_snapshots_at_a_place_and_another_machine(tmp_path: Path) -> None:
    async def attempt() -> str:
        try:
            await sb.snapshot(tmp_path / "saved")
        except (ConfigError, HostError) as error:
            return str(error)
        return ""

    async with sandbox(memory=192, cpus=2, template="off") as sb:
        with pytest.raises(ConfigError, match="path=''"):
            await sb.snapshot("")
        outcomes = await asyncio.gather(attempt(), attempt())
        assert sorted(map(bool, outcomes)) == [False, True]
    assert await asyncio.to_thread(os.listdir, tmp_path) == ["saved"]
    async with Sandbox.restore(tmp_path / "saved", isolation="emulated") as again:
        assert (again.options.memory, again.options.cpus) == (192, 2)
        assert (await again.run(BUSYBOX, ["nproc"])).stdout == "2\n"


LOGGING = "i=0; while :; do i=$((i+1)); read up _ < /proc/uptime; echo $i $up $(date +%s) >> /log; done"


async def test_a_copy_executes_nothing_before_its_clock_is_right(tmp_path: Path) -> None:
    async with sandbox() as sb, sb.container(BUSYBOX) as c, c.process(["sh", "-c", LOGGING]):
        await c.run(["sh", "-c", "until [ -s /log ]; do sleep 0.1; done"])
        await sb.snapshot(tmp_path / "saved")
        await anyio.sleep(5)
        logged = (await c.run(["cat", "/log"])).stdout.splitlines()
    async with Sandbox.restore(tmp_path / "saved", isolation="emulated") as again:
        await goes_on(again.containers[c.id], "/log")
        copied = (await again.containers[c.id].run(["cat", "/log"])).stdout.splitlines()

    def started(line: str) -> float:
        """When the guest was switched on, by its clocks."""
        _, up, now = line.split()
        return int(now) - float(up)

    # Between a line's two times its shell may have waited, on a busy machine, but not in each of them.
    late = [line for line in copied if started(line) > min(map(started, logged)) + 2]
    assert late
    # What was written by the old clock was so before it was saved.
    assert set(copied) - set(late) <= set(logged)


async def test_a_pause_stops_everything_but_the_clock() -> None:
    async with sandbox() as sb, sb.container(BUSYBOX) as c, c.process(["sh", "-c", COUNTING]) as counting:
        await anext(counting.stdout)
        await sb.pause()
        for refused in (sb.fork(), sb.snapshot("/nowhere"), sb.run(BUSYBOX, ["true"]), c.run(["true"]), sb.stats()):
            with pytest.raises(ConfigError, match="is paused"):
                await refused
        while counting.stdout.take():
            pass
        await anyio.sleep(1.5)
        await sb.resume()
        assert await clocked(c, ":") == []
        assert (await anext(counting.stdout)).strip()


async def test_a_container_that_is_left_in_a_pause_is_not_waited_for() -> None:
    async with sandbox() as sb:
        async with sb.container(BUSYBOX):
            await sb.pause()
        await sb.resume()
        with pytest.raises(SandboxClosedError, match="while this sandbox was paused"):
            await sb.run(BUSYBOX, ["true"])


async def test_what_has_a_network_says_why_it_can_not_be_saved(tmp_path: Path) -> None:
    async with sandbox() as sb:
        sb._open.options = evolve(sb._open.options, network=Network("user"))
        for refused in (sb.fork(), sb.snapshot(tmp_path / "saved")):
            with pytest.raises(ConfigError, match="has a network"):
                await refused


@asynccontextmanager
async def no_room(cost: int) -> AsyncIterator[bool]:
    yield False


@asynccontextmanager
async def room(cost: int) -> AsyncIterator[bool]:
    yield True


async def ready(following: NextFork) -> Waiting:
    """The machine that waits for the next fork, as soon as it does: it must come, there is :func:`room`."""
    with anyio.fail_after(300):
        await following.filled()
    return following._ready[0]


async def wait_for(running: Running, last: Waiting | None) -> Waiting | None:
    """A machine waits for the next fork from now on. The last one that did is in use, if it was taken, or has ended."""
    if (following := running.next_fork) is None:
        return None
    if last is not None and not following._ready:
        assert running.ahead is not None
        taken = [spare.machine.vm for spare in running.ahead._ready]
        assert last.machine.vm in taken or not last.is_good
    following.want()
    return await ready(following)


async def test_forks_that_are_cancelled_leave_no_machine_that_has_waited_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pykata.spares.admitted_now", room)
    async with sandbox() as sb, sb.container(BUSYBOX) as c:
        await c.run(["true"])
        await sb.fork()
        waiting = [await wait_for(sb._open, None)]
        assert waiting[0] is not None

        async def unchanged(n: int, way: Way) -> None:
            waiting.append(await wait_for(sb._open, waiting.pop()))
            assert (await c.run(["echo", "on"])).stdout == "on\n", f"cancelled at suspension {n} ({way})"

        assert await cancel_everywhere(sb.fork, unchanged, step=4) > 4


@pytest.mark.parametrize("ahead", [False, True])
async def test_cancelled_and_concurrent_forks_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    if not ahead:
        monkeypatch.setattr("pykata.ahead.admitted_now", no_room)
    async with sandbox() as sb, sb.container(BUSYBOX) as c:
        await c.run(["true"])       # and what is imported and kept open from the first command on
        before = descriptors()
        kept: list[int] = []

        async def work() -> None:
            children = await sb.fork()
            kept.append(len(children))
            await sb.snapshot(tmp_path / "saved" / str(len(kept)))

        async def unchanged(n: int, way: Way) -> None:
            where = f"cancelled at suspension {n} ({way})"
            if not ahead:       # else there is a machine for the first child, unless all turns were taken
                assert descriptors() == before + len(kept), where   # the memory that the children go on from
            assert not list((tmp_path / "saved").glob(".*")), where
            assert (await c.run(["echo", "on"])).stdout == "on\n", where

        (tmp_path / "saved").mkdir()
        assert await cancel_everywhere(work, unchanged, step=4) > 8
        async with anyio.create_task_group() as group:
            group.start_soon(sb.snapshot, tmp_path / "concurrent")
            for _ in range(3):
                group.start_soon(work)
        assert ahead or descriptors() == before + len(kept)
        (child,) = await sb.fork()
        async with child:
            assert (await child.containers[c.id].run(["echo", "on"])).stdout == "on\n"


async def test_the_first_child_takes_the_machine_that_was_started_for_it() -> None:
    async with sandbox() as parent, parent.container(BUSYBOX) as c:
        await c.run(["sh", "-c", "echo 1 > /file"])
        unused = await parent.fork()
        children = await parent.fork(2)
        ahead = parent._open.ahead
        assert ahead is not None
        assert unused[0].options.spares is not ahead is children[0].options.spares
        for child in (*children, *unused):
            async with child:
                assert not ahead._ready
                inside = child.containers[c.id]
                done = await inside.run(["sh", "-c", "cat /file; hostname"])
                assert done.stdout.split() == ["1", child.options.hostname]
        (late,) = await parent.fork()
        if (spare := parent._open.ahead) is not None and spare._ready:
            machine = spare._ready[0].machine.vm
            assert machine is not None
            os.kill(machine.pid, signal.SIGKILL)
            os.waitid(os.P_PID, machine.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 it is killed already
        async with late:        # without it
            assert (await late.containers[c.id].run(["cat", "/file"])).stdout == "1\n"


async def test_out_of_descriptors() -> None:
    """Wherever they run out, a fork fails with a HostError, and the sandbox goes on."""
    async with sandbox() as parent, parent.container(BUSYBOX) as c:
        await parent.fork()     # what is made for the first one only is there
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(first := os.dup(0))        # the lowest number that is free
        errors: list[HostError] = []
        for limit in range(first, first + 40):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            try:
                await parent.fork()
                break
            except HostError as error:
                errors.append(error)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        else:
            pytest.fail(f"never enough: {errors[-1]}")
        assert errors
        assert not any("trace" in error.hint for error in errors)
        assert (await c.run(["echo", "x"])).stdout == "x\n"


async def test_the_next_fork_finds_a_machine_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykata.spares.admitted_now", room)
    async with sandbox() as parent, parent.container(BUSYBOX) as c:
        async def forked(line: str) -> str:
            """What a child reads that is forked when the parent has written one more line."""
            await c.run(["sh", "-c", f"echo {line} >> /file"])
            (child,) = await parent.fork()
            async with child:
                return (await child.containers[c.id].run(["cat", "/file"])).stdout.replace("\n", " ")

        assert await forked("1") == "1 "
        following = parent._open.next_fork
        assert following is not None
        waiting = (await ready(following)).machine.vm
        assert waiting is not None
        (child,) = await parent.fork()
        ahead = parent._open.ahead
        assert ahead is not None
        assert [spare.machine.vm for spare in ahead._ready] == [waiting]
        async with child:
            assert (await child.containers[c.id].run(["cat", "/file"])).stdout == "1\n"
        await ready(following)
        assert await forked("2") == "1 2 "
        waiting = (await ready(following)).machine.vm
        assert waiting is not None
        os.kill(waiting.pid, signal.SIGKILL)
        os.waitid(os.P_PID, waiting.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 it is killed already
        assert await forked("3") == "1 2 3 "
        await ready(following)
        assert following.give_up()
        assert await forked("4") == "1 2 3 4 "


async def test_a_fork_with_other_disks_than_the_machine_that_waits_starts_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("spares", "ahead"):
        monkeypatch.setattr(f"pykata.{module}.admitted_now", room)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    async with sandbox() as parent, parent.container(BUSYBOX) as c:
        await c.run(["sh", "-c", "echo parents > /file"])
        await parent.fork()
        following = parent._open.next_fork
        assert following is not None
        following.want()
        waiting = await ready(following)
        async with parent._open.vm.plug(Disk("other", tmp_path / "disk")):
            assert not waiting.is_good
            (child,) = await parent.fork()
        ahead = parent._open.ahead
        assert ahead is not None
        (spare,) = ahead._ready
        assert spare.machine.vm is not waiting.machine.vm
        async with child:
            assert not ahead._ready
            assert (await child.containers[c.id].run(["cat", "/file"])).stdout == "parents\n"
