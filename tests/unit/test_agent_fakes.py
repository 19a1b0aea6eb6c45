"""The public fakes: a whole sandbox with nothing behind it, and machines that fail when they are told to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from pykata import Sandbox
from pykata.errors import AgentTimeoutError, BootError, BootTimeoutError, GuestPanicError, PykataError, VMDiedError
from pykata.spec import Disk
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess, FakeVM, fake_bundle, fake_image
from pykata.testing.faults import Fault, Moment
from tests.cancellation import Way, cancel_everywhere

IMAGE = "builtin:busybox"
GUARD = 300.0    # seconds; only a hang takes that long


@pytest.fixture(autouse=True)
def bundle_of_nothing(tmp_path: Path) -> Iterator[None]:
    with fake_bundle(tmp_path):
        yield


def sandbox(hypervisor: FakeHypervisor | None = None, **options: float) -> Sandbox:
    return Sandbox(hypervisor or FakeHypervisor(), FakeFs(), **options)     # type: ignore[arg-type]


async def test_run() -> None:
    async with sandbox() as sb:
        done = await sb.run(IMAGE, ["echo", "hello"])
        assert (done.stdout, done.exit_code) == ("hello\n", 0)
        done = await sb.run(IMAGE, ["cat"], input=b"x" * 1_000_000)
        assert len(done.stdout) == 1_000_000
        assert (await sb.run(IMAGE, ["false"])).exit_code == 1
        assert (await sb.run(IMAGE)).exit_code == 0
        assert (await sb.run(IMAGE, ["env"], env={"A": "b"})).stdout.splitlines()[-1] == "A=b"
        done = await sb.run(IMAGE, ["nonsense"])
        assert (done.exit_code, done.stderr) == (127, "nonsense: not found\n")


async def test_own_commands() -> None:
    async def greet(process: FakeProcess) -> int:
        await process.write(b"hello " + await process.read())
        await process.write_error(process.cwd.encode())
        return 3

    async def starve(process: FakeProcess) -> int:
        process.kill(signal.SIGKILL, oom=True)
        await anyio.sleep_forever()
        return 0

    async def broken(process: FakeProcess) -> int:
        raise LookupError("oops")

    async with sandbox(FakeHypervisor({"greet": greet, "starve": starve, "broken": broken})) as sb:
        done = await sb.run(IMAGE, ["greet"], input="you", cwd="/srv")
        assert (done.stdout, done.stderr, done.exit_code) == ("hello you", "/srv", 3)
        assert (await sb.run(IMAGE, ["starve"])).reason == "oom"
        assert (await sb.run(IMAGE, ["broken"])).stderr == "LookupError: oops\n"


async def test_timeout_keeps_output() -> None:
    async with sandbox() as sb:
        done = await sb.run(IMAGE, ["yes"], timeout=2)
        assert done.reason == "timeout"
        assert done.stdout.startswith("y\ny\n")


async def test_what_the_machine_saw() -> None:
    hypervisor = FakeHypervisor()
    async with sandbox(hypervisor) as sb:
        (vm,) = hypervisor.machines
        async with sb.container(IMAGE) as container:
            await container.run(["true"])
            assert list(vm.agent.containers) == [container.id]
            assert list(vm.plugged) == ["fake1"]
        assert vm.agent.containers == {}
        assert vm.plugged == {}
    names = [type(request).__name__ for request in vm.agent.requests]
    assert names[:3] == ["SetupRequest", "CreateContainerRequest", "RunRequest"]


FAULTS: dict[tuple[Moment, Fault], type[Exception]] = {
    ("boot", "die"): BootError,
    ("boot", "panic"): BootError,
    ("boot", "hang"): BootTimeoutError,
    ("Setup", "die"): BootError,
    ("Setup", "panic"): BootError,
    ("Setup", "hang"): BootTimeoutError,
    ("plug", "die"): PykataError,
    ("Run", "die"): VMDiedError,
    ("Run", "panic"): GuestPanicError,
}


@pytest.mark.parametrize(("moment", "fault"), FAULTS)
async def test_faults(moment: Moment, fault: Fault) -> None:
    boot_timeout = 0.5 if fault == "hang" else GUARD

    async def use() -> None:
        async with sandbox(FakeHypervisor(faults={moment: fault}), boot_timeout=boot_timeout) as sb:
            await sb.run(IMAGE, ["true"])

    with anyio.fail_after(GUARD), pytest.raises(FAULTS[moment, fault]):
        await use()


async def test_dies_in_the_middle() -> None:
    async def suicide(process: FakeProcess) -> int:
        await process.write(b"last words")
        hypervisor.machines[0].panic()
        await anyio.sleep_forever()
        return 0

    hypervisor = FakeHypervisor({"suicide": suicide})
    with anyio.fail_after(GUARD):
        async with sandbox(hypervisor) as sb:
            done = await sb.run(IMAGE, ["suicide"])
            assert done.reason == "vm_died"
            assert done.stdout == "last words"
            with pytest.raises(GuestPanicError):
                await sb.run(IMAGE, ["true"])
            assert "Kernel panic" in sb.console


async def test_slots() -> None:
    hypervisor = FakeHypervisor(disk_slots=1)
    async with sandbox(hypervisor):
        vm = hypervisor.machines[0]
        async with vm.plug(Disk("a", Path("/dev/null"))):
            with anyio.move_on_after(0.01) as scope:
                async with vm.plug(Disk("b", Path("/dev/null"))):
                    pytest.fail("there was only one slot")
            assert scope.cancelled_caught
        async with vm.plug(Disk("b", Path("/dev/null"))) as serial:
            assert set(vm.plugged) == {serial}


async def test_hanging_call() -> None:
    hypervisor = FakeHypervisor(faults={"Stats": "hang"})
    async with sandbox(hypervisor) as sb:
        assert sb._running is not None
        with pytest.raises(AgentTimeoutError):
            await sb._running.agent.stats(timeout=0.05)
        assert (await sb.run(IMAGE, ["true"])).exit_code == 0


async def test_cancelled_everywhere() -> None:
    hypervisor = FakeHypervisor()

    async def use() -> None:
        async with sandbox(hypervisor) as sb:
            await sb.run(IMAGE, ["cat"], input="x")

    async def afterwards(n: int, way: Way) -> None:
        for vm in hypervisor.machines:
            assert isinstance(vm, FakeVM)
            assert vm.plugged == {}
        hypervisor.machines.clear()

    with anyio.fail_after(GUARD):
        assert await cancel_everywhere(use, afterwards) > 10


def test_fake_image(tmp_path: Path) -> None:
    image = fake_image("some")
    assert image.write_tar
    with (tmp_path / "tar").open("wb") as out:
        image.write_tar(out)
    assert image.digest != fake_image("other").digest
