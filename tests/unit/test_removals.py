"""Containers that are taken down while nobody waits for it, over fakes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from pykata import ConfigError, Sandbox, Tmpfs, VMDiedError
from pykata.errors import AgentRefusedError
from pykata.spec import Disk
from pykata.testing import FakeFs, FakeHypervisor, FakeVM
from pykata.testing.faults import Moment
from tests.settling import settled

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"


class Gate:
    """Holds the removal of containers up until it is opened."""

    def __init__(self) -> None:
        self.opened = anyio.Event()
        self.refuse = False

    async def __call__(self, moment: Moment) -> None:
        if moment == "removal":
            await self.opened.wait()
            if self.refuse:
                raise AgentRefusedError("the mount is busy", status="INTERNAL")


def machine(sandbox: Sandbox) -> FakeVM:
    vm = sandbox._open.vm
    assert isinstance(vm, FakeVM)
    return vm


def held(sandbox: Sandbox) -> Gate:
    gate = machine(sandbox).agent.before_call = Gate()
    return gate


@pytest.fixture
async def sb() -> AsyncIterator[Sandbox]:
    async with Sandbox(FakeHypervisor(), FakeFs()) as sandbox:
        yield sandbox


async def test_what_a_command_did_is_known_before_its_container_is_gone(sb: Sandbox) -> None:
    gate = held(sb)
    assert (await sb.run(BUSYBOX, ["echo", "well"])).stdout == "well\n"
    assert machine(sb).agent.containers
    assert machine(sb).plugged
    gate.opened.set()
    await sb._open.settled()
    assert not machine(sb).agent.containers
    assert not machine(sb).plugged


async def test_a_process_s_block_is_left_before_its_container_is_gone(sb: Sandbox) -> None:
    gate = held(sb)
    async with sb.process(BUSYBOX, ["echo", "well"]) as process:
        assert await process.wait() == 0
    assert machine(sb).agent.containers
    gate.opened.set()
    await sb._open.settled()
    assert not machine(sb).agent.containers


async def test_one_that_is_killed_as_its_block_is_left_is_gone_then(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["cat"]):
        pass
    assert not machine(sb).agent.containers


@pytest.mark.parametrize("use", [
    pytest.param(lambda sb: sb.run(BUSYBOX, ["true"]), id="run"),
    pytest.param(lambda sb: sb.main.run(["true"]), id="container.run"),
    pytest.param(lambda sb: sb.main.start(["true"]), id="container.start"),
    pytest.param(lambda sb: sb.main.files.exists("/etc"), id="files"),
    pytest.param(lambda sb: sb.stats(), id="stats"),
    pytest.param(lambda sb: sb.pause(), id="pause"),
])  # fmt: skip
async def test_who_needs_the_guest_waits(
    sb: Sandbox, use: Callable[[Sandbox], Awaitable[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pause() -> None:
        pass

    monkeypatch.setattr(machine(sb), "pause", pause, raising=False)
    async with sb.container(BUSYBOX) as main:
        monkeypatch.setattr(type(sb), "main", main)
        gate = held(sb)
        await sb.run(BUSYBOX, ["true"])
        agent = machine(sb).agent
        (last,) = set(agent.containers) - {main.id}
        asked = len(agent.requests)

        async def using() -> None:
            await use(sb)
            assert last not in agent.containers

        async with anyio.create_task_group() as group:
            group.start_soon(using)
            await settled()
            assert len(agent.requests) == asked
            gate.opened.set()
        sb._open.is_paused = False
        await sb._open.settled()


@pytest.fixture
def resting(sb: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine can be paused."""
    async def pause() -> None:
        pass

    monkeypatch.setattr(machine(sb), "pause", pause, raising=False)


async def refused(use: Awaitable[object]) -> None:
    with pytest.raises(ConfigError, match="is paused"):
        await use


async def kept(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX):
        pass


@pytest.mark.parametrize("use", [
    pytest.param(lambda sb: sb.run(BUSYBOX, ["true"]), id="run"),
    pytest.param(kept, id="container"),
])  # fmt: skip
async def test_what_meets_a_pause_is_refused_and_harms_nothing(
    sb: Sandbox, use: Callable[[Sandbox], Awaitable[object]], resting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = held(sb)
    await sb.run(BUSYBOX, ["true"])
    plugging = machine(sb).plug

    @asynccontextmanager
    async def plug(disk: Disk) -> AsyncIterator[str]:
        async with plugging(disk) as serial:
            await settled()         # the pause comes meanwhile
            yield serial

    monkeypatch.setattr(machine(sb), "plug", plug)
    async with anyio.create_task_group() as group:
        group.start_soon(refused, use(sb))
        group.start_soon(sb.pause)
        await settled()
        asked = len(machine(sb).agent.requests)
        gate.opened.set()
    assert len(machine(sb).agent.requests) == asked
    sb._open.is_paused = False
    assert (await sb.run(BUSYBOX, ["echo", "on"])).stdout == "on\n"


async def test_nothing_runs_in_a_container_in_a_pause(sb: Sandbox, resting: None) -> None:
    async with sb.container(BUSYBOX) as container:
        await sb.pause()
        await refused(container.run(["true"]))
        sb._open.is_paused = False


async def test_a_container_that_waits_is_there_still_after_a_pause(
    sb: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = anyio.Event()
    monkeypatch.setattr(machine(sb), "pause", opened.wait, raising=False)
    for _ in range(2):
        await sb.run(BUSYBOX, ["true"])
    await sb._open.settled()
    await settled()
    (waiting,) = machine(sb).agent.containers
    async with anyio.create_task_group() as group:
        group.start_soon(sb.pause)
        await settled()
        group.start_soon(refused, sb.run(BUSYBOX, ["true"]))
        await settled()
        opened.set()
    assert list(machine(sb).agent.containers) == [waiting]
    sb._open.is_paused = False
    async with sb.process(BUSYBOX, ["cat"]):
        assert list(machine(sb).agent.containers) == [waiting]


async def test_a_sandbox_that_is_left_waits_for_nothing() -> None:
    async with Sandbox(FakeHypervisor(), FakeFs()) as sb:
        held(sb)
        await sb.run(BUSYBOX, ["true"])
    # the gate is closed still


async def test_who_waits_when_the_sandbox_is_left_goes_on() -> None:
    async with anyio.create_task_group() as group, Sandbox(FakeHypervisor(), FakeFs()) as sb:
        held(sb)
        await sb.run(BUSYBOX, ["true"])
        group.start_soon(sb._open.settled)
        await settled()


async def test_a_removal_that_fails_is_told_and_tried_again(sb: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    gate = held(sb)
    gate.refuse = True
    gate.opened.set()
    with caplog.at_level(logging.ERROR, "pykata.removals"):
        assert (await sb.run(BUSYBOX, ["true"])).ok
        await sb._open.settled()
    assert "the mount is busy" in caplog.text
    gate.refuse = False
    assert (await sb.run(BUSYBOX, ["echo", "on"])).stdout == "on\n"
    await sb._open.settled()
    assert not machine(sb).agent.containers


async def test_a_machine_that_dies_meanwhile_is_told_to_who_comes_next_alone(
    caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pykata.removals")
    async with Sandbox(FakeHypervisor(faults={"removal": "die"}), FakeFs()) as sb:
        assert (await sb.run(BUSYBOX, ["echo", "well"])).stdout == "well\n"
        with pytest.raises(VMDiedError):
            await sb.run(BUSYBOX, ["true"])
    assert not [one for one in caplog.records if one.name == "pykata.removals"]


async def test_what_goes_to_volumes_is_there_when_the_command_is_over() -> None:
    async with Sandbox(FakeHypervisor(), FakeFs(), volumes={"/v": Tmpfs("1M")}) as sb:
        gate = held(sb)

        async def run() -> None:
            await sb.run(BUSYBOX, ["true"])
            assert gate.opened.is_set()
            assert not machine(sb).agent.containers

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await settled()
            gate.opened.set()
