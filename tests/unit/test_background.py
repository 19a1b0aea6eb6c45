"""Processes that outlive the call that started them, over fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import anyio
import pytest

from pykata import AgentRefusedError, ConfigError, Container, Sandbox, SandboxClosedError, VMDiedError
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess, FakeVM
from tests.settling import settled

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"


async def talks(process: FakeProcess) -> int:
    assert await process.read() == b"", "its stdin is empty"
    for number in range(10):
        await process.write(b"%d\n" % number)
        await process.write_error(b"!")
    return int(process.args[1])


@pytest.fixture
def hypervisor() -> FakeHypervisor:
    return FakeHypervisor(commands={"talks": talks})


@pytest.fixture
async def container(hypervisor: FakeHypervisor) -> AsyncIterator[Container]:
    async with Sandbox(hypervisor, FakeFs()) as sandbox, sandbox.container(BUSYBOX) as container:
        yield container


@pytest.fixture
def vm(container: Container, hypervisor: FakeHypervisor) -> FakeVM:
    return hypervisor.machines[-1]


async def test_its_end_and_the_end_of_what_it_wrote(container: Container) -> None:
    process = await container.start(["talks", "7"], log=7)
    assert process.args == ("talks", "7")
    assert process.pid > 0
    assert process.returncode is None
    assert await process.wait() == process.returncode == await process.poll() == 7
    assert await process.wait() == 7
    assert await process.log() == b"7\n!8\n!9\n!"[-7:]


async def test_it_outlives_everything_but_its_container(hypervisor: FakeHypervisor) -> None:
    async with Sandbox(hypervisor, FakeFs()) as sandbox:
        async with sandbox.container(BUSYBOX) as container:
            process = await container.start(["sleep", "infinity"])
            assert (await container.run(["echo", "hi"])).stdout == "hi\n"
            assert await process.poll() is None
        (vm,) = hypervisor.machines
        assert vm.agent.containers == {}
        with pytest.raises(AgentRefusedError):
            await process.wait()
        with pytest.raises(SandboxClosedError):
            await container.start(["true"])


async def test_signals(container: Container) -> None:
    for end, code in (("terminate", 143), ("kill", 137)):
        process = await container.start(["sleep", "infinity"], log=0)
        waiting = asyncio.create_task(process.wait())
        await settled()
        await getattr(process, end)()
        assert await waiting == code
        await process.kill()


async def test_a_wait_that_is_cancelled_costs_nothing(container: Container) -> None:
    process = await container.start(["sleep", "infinity"])
    with anyio.move_on_after(0.01):
        await process.wait()
    await process.kill()
    assert await process.wait() == 137


async def test_its_machine_dies(container: Container, vm: FakeVM) -> None:
    process = await container.start(["sleep", "infinity"])
    waiting = asyncio.create_task(process.wait())
    await settled()
    vm.die()
    with pytest.raises(VMDiedError):
        await waiting


@pytest.mark.parametrize("log", [-1, 65537, True, None])
async def test_a_log_that_cannot_be_kept(container: Container, log: int) -> None:
    with pytest.raises(ConfigError, match="log="):
        await container.start(["true"], log=log)
