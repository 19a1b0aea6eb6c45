"""The whole sandbox over fakes: what is asked for arrives in the guest, and what comes back is what happened."""

from __future__ import annotations

import threading
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import pykata.isolation
from pykata import (
    CommandFailedError,
    Completed,
    ConfigError,
    EmulationWarning,
    ImageNotFoundError,
    ImageReferenceError,
    IsolationError,
    Sandbox,
    SandboxClosedError,
    VMDiedError,
)
from pykata.agent import v1
from pykata.host import run_root
from pykata.spec import MIB
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess, FakeVM
from tests.settling import settled

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"


async def complain(process: FakeProcess) -> int:
    await process.write(b"out\n")
    await process.write_error(b"first\nlast words\n")
    return int(process.args[1])


async def where(process: FakeProcess) -> int:
    await process.write(f"{process.cwd} {process.user!r}".encode())
    return 0


COMMANDS = {"complain": complain, "where": where}


@pytest.fixture
def hypervisor() -> FakeHypervisor:
    return FakeHypervisor(commands=COMMANDS)


@pytest.fixture
async def sb(hypervisor: FakeHypervisor) -> AsyncIterator[Sandbox]:
    async with Sandbox(hypervisor, FakeFs(), hostname="here", env={"A": "sandbox", "B": "sandbox"}) as sandbox:
        yield sandbox


def machine(sandbox: Sandbox) -> FakeVM:
    hypervisor = sandbox.options.hypervisor
    assert isinstance(hypervisor, FakeHypervisor)
    return hypervisor.machines[-1]


def requests(sandbox: Sandbox, kind: type[Any]) -> list[Any]:
    return [request for request in machine(sandbox).agent.requests if isinstance(request, kind)]


# --- running ---


async def test_a_command_s_result(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, ["complain", "3"])
    assert done == Completed(
        args=("complain", "3"), exit_code=3, reason="exit", stdout_bytes=b"out\n", stderr_bytes=b"first\nlast words\n"
    )
    assert (done.stdout, done.stderr, done.ok) == ("out\n", "first\nlast words\n", False)
    assert (await sb.run(BUSYBOX, ["complain", "0"])).ok


async def test_check_raises_with_the_result_in_it(sb: Sandbox) -> None:
    with pytest.raises(CommandFailedError, match="'complain' ended with exit code 3") as caught:
        await sb.run(BUSYBOX, ["complain", "3"], check=True)
    assert caught.value.completed.stdout == "out\n"
    assert caught.value.hint == "last words"
    assert (await sb.run(BUSYBOX, ["complain", "0"], check=True)).ok


async def test_the_image_s_own_command(sb: Sandbox) -> None:
    assert (await sb.run(BUSYBOX)).args == ("true",)


async def test_an_entrypoint_takes_the_command_as_arguments(sb: Sandbox) -> None:
    assert (await sb.run(BUSYBOX, ["b"], entrypoint=["echo", "a"])).stdout == "a b\n"
    assert (await sb.run(BUSYBOX, entrypoint=["echo", "alone"])).stdout == "alone\n"


async def test_env_of_the_image_the_sandbox_and_the_call(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, ["env"], env={"B": "call", "C": "call", "EMPTY": "", "EQ": "a=b"})
    env = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert env["PATH"] == "/usr/sbin:/usr/bin:/sbin:/bin"
    assert {name: env[name] for name in ("A", "B", "C", "EMPTY", "EQ")} == {
        "A": "sandbox", "B": "call", "C": "call", "EMPTY": "", "EQ": "a=b",
    }  # fmt: skip


async def test_cwd_and_user_reach_the_process(sb: Sandbox) -> None:
    assert (await sb.run(BUSYBOX, ["where"])).stdout == "/ ''"
    assert (await sb.run(BUSYBOX, ["where"], cwd="/tmp", user="www:adm")).stdout == "/tmp 'www:adm'"


async def test_input_is_text_or_bytes_and_ends(sb: Sandbox) -> None:
    assert (await sb.run(BUSYBOX, ["cat"], input="grüß")).stdout == "grüß"
    assert (await sb.run(BUSYBOX, ["cat"], input=bytes(range(256)))).stdout_bytes == bytes(range(256))
    assert (await sb.run(BUSYBOX, ["cat"], input=b"")).stdout == ""
    assert (await sb.run(BUSYBOX, ["cat"])).stdout == ""


async def test_a_command_that_is_not_there_is_127(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, ["no-such-program"])
    assert (done.exit_code, done.reason, done.stderr) == (127, "exit", "no-such-program: not found\n")


async def test_a_container_takes_several_commands(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        assert container.image.config.cmd == ("true",)
        assert (await container.run(["echo", "one"])).stdout == "one\n"
        assert (await container.run(["cat"], input="two")).stdout == "two"
        async with container.process(["echo", "three"]) as process:
            assert await process.stdout.read() == b"three\n"
        assert set(machine(sb).agent.containers) == {container.id}
        with pytest.raises(CommandFailedError):
            await container.run(["false"], check=True)
        with pytest.raises(ConfigError, match="cmd=None"):
            await container.run(None)  # type: ignore[arg-type]
    assert machine(sb).agent.containers == {}
    assert machine(sb).plugged == {}


async def test_containers_are_apart_and_gone_afterwards(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as one, sb.container(BUSYBOX) as two:
        assert one.id != two.id
        assert len(machine(sb).plugged) == 2
        assert (await sb.run(BUSYBOX, ["echo", "third"])).stdout == "third\n"
    await sb._open.settled()
    assert machine(sb).agent.containers == {}
    assert machine(sb).plugged == {}


async def test_more_containers_than_disk_slots_wait_for_one(sb: Sandbox) -> None:
    slots = sb.features.disk_slots
    done: list[str] = []

    async def run(number: int) -> None:
        done.append((await sb.run(BUSYBOX, ["echo", str(number)])).stdout)

    async with anyio.create_task_group() as group:
        for number in range(3 * slots):
            group.start_soon(run, number)
    assert sorted(done) == sorted(f"{number}\n" for number in range(3 * slots))


async def test_a_run_is_one_call(sb: Sandbox) -> None:
    machine(sb).agent.requests.clear()
    await sb.run(BUSYBOX, ["true"])
    await sb._open.settled()
    assert [type(request) for request in machine(sb).agent.requests] == [v1.RunRequest]
    assert not machine(sb).agent.containers


async def test_a_run_that_is_left_early_sees_to_its_container(sb: Sandbox) -> None:
    machine(sb).agent.requests.clear()
    async with sb.process(BUSYBOX, ["cat"]):
        pass
    assert [type(request) for request in machine(sb).agent.requests] == [v1.RunRequest, v1.RemoveContainerRequest]


# --- what the guest is told ---


async def test_what_was_asked_for_reaches_the_guest(hypervisor: FakeHypervisor) -> None:
    sandbox = Sandbox(hypervisor, FakeFs(), hostname="asked", cpus=3, memory="512M", disk="96M")
    async with sandbox:
        async with sandbox.container(BUSYBOX):
            pass
        (setup,) = requests(sandbox, v1.SetupRequest)
        (create,) = requests(sandbox, v1.CreateContainerRequest)
    assert (machine(sandbox).spec.cpus, machine(sandbox).spec.memory) == (3, 512)
    assert setup.hostname == "asked"
    assert create.rootfs.writable_bytes == 96 * MIB
    assert (create.oci_spec, create.usual.hostname) == (b"", "")     # the guest's
    assert 0 < create.usual.memory_limit < 512 * MIB


async def test_the_host_name_is_new_for_each_sandbox_and_the_disk_half_the_memory() -> None:
    one, two = (Sandbox("qemu", FakeFs()) for _ in range(2))
    assert one.options.hostname != two.options.hostname
    assert one.options.disk == 128 * MIB


# --- before anything starts ---


@pytest.mark.parametrize(
    "arguments",
    [
        {"cmd": []}, {"cmd": ()}, {"cmd": [""]}, {"cmd": "echo hi"}, {"cmd": b"echo"}, {"cmd": ["a\0"]},
        {"cmd": ["a", 1]}, {"entrypoint": "sh"}, {"entrypoint": ["a", 1]},
        {"timeout": 0}, {"timeout": -1}, {"timeout": "1"}, {"timeout": float("nan")}, {"timeout": True},
        {"max_output": -1}, {"max_output": 1.5}, {"max_output": True}, {"input": 3}, {"input": ["a"]},
        {"env": {"A=B": "c"}}, {"env": {"A": None}}, {"env": ["A=B"]}, {"cwd": "relative"}, {"cwd": "/\0"},
        {"user": 0}, {"user": "a\0"}, {"on_stdout": "print"}, {"on_stderr": 1},
    ],
    ids=str,
)  # fmt: skip
async def test_a_bad_argument_is_refused_before_the_guest_hears_of_it(sb: Sandbox, arguments: dict[str, Any]) -> None:
    machine(sb).agent.requests.clear()
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        await sb.run(BUSYBOX, **{"cmd": ["true"], **arguments})
    assert machine(sb).agent.requests == []
    if "entrypoint" not in arguments:
        async with sb.container(BUSYBOX) as container:
            with pytest.raises(ConfigError):
                await container.run(**{"cmd": ["true"], **arguments})
    assert requests(sb, v1.RunRequest) == []


@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ("builtin:nothing", ImageNotFoundError), ("oci:/no/such/layout", ImageNotFoundError), ("", ImageReferenceError),
        ("tar:/no/such/file", ImageNotFoundError), ("\0", ImageReferenceError), ("oci:", ImageReferenceError),
    ],
)  # fmt: skip
async def test_an_image_that_is_not_there(sb: Sandbox, reference: str, error: type[Exception]) -> None:
    machine(sb).agent.requests.clear()
    with pytest.raises(error):
        await sb.run(reference, ["true"])
    with pytest.raises(error):
        async with sb.container(reference):
            raise AssertionError("there is a container")
    assert machine(sb).agent.requests == []
    assert (await sb.run(BUSYBOX, ["echo", "still here"])).stdout == "still here\n"


async def test_no_command_at_all(sb: Sandbox) -> None:
    with pytest.raises(ConfigError, match="no command"):
        await sb.run(BUSYBOX, entrypoint=[])


# --- a sandbox's life ---


async def test_a_sandbox_that_is_not_open_says_so(hypervisor: FakeHypervisor) -> None:
    sandbox = Sandbox(hypervisor, FakeFs())

    async def uses() -> None:
        for use in (
            lambda: sandbox.accel, lambda: sandbox.isolation, lambda: sandbox.timings, lambda: sandbox.console,
            lambda: sandbox.container(BUSYBOX),
        ):  # fmt: skip
            with pytest.raises(SandboxClosedError):
                use()
        with pytest.raises(SandboxClosedError):
            await sandbox.run(BUSYBOX, ["true"], timeout=-1)
        with pytest.raises(SandboxClosedError):
            async with sandbox.process(BUSYBOX, ["true"]):
                raise AssertionError("it runs")

    await uses()
    async with sandbox:
        assert sandbox.accel == "kvm"
    await uses()


async def test_a_sandbox_can_be_entered_again_when_it_was_left(hypervisor: FakeHypervisor) -> None:
    sandbox = Sandbox(hypervisor, FakeFs())
    for _ in range(3):
        async with sandbox:
            assert (await sandbox.run(BUSYBOX, ["echo", "hi"])).stdout == "hi\n"
    assert len(hypervisor.machines) == 3


async def test_a_sandbox_is_entered_once_at_a_time(hypervisor: FakeHypervisor) -> None:
    sandbox = Sandbox(hypervisor, FakeFs())
    outcomes: list[str] = []

    async def enter() -> None:
        try:
            async with sandbox:
                outcomes.append("entered")
                await anyio.sleep_forever()
        except SandboxClosedError:
            outcomes.append("refused")

    async with anyio.create_task_group() as group:
        group.start_soon(enter)
        group.start_soon(enter)
        await settled()
        group.cancel_scope.cancel()
    assert sorted(outcomes) == ["entered", "refused"]
    assert len(hypervisor.machines) == 1


async def test_a_sandbox_whose_boot_failed_can_be_entered_again(tmp_path: Path) -> None:
    faults: dict[Any, Any] = {"boot": "die"}
    sandbox = Sandbox(FakeHypervisor(faults=faults), FakeFs())
    with pytest.raises(pykata.BootError):
        await sandbox.__aenter__()
    faults.clear()
    async with sandbox:
        assert (await sandbox.run(BUSYBOX, ["true"])).ok


async def test_nested_sandboxes_have_machines_of_their_own(hypervisor: FakeHypervisor) -> None:
    async with Sandbox(hypervisor, FakeFs()) as outer, Sandbox(hypervisor, FakeFs()) as inner:
        async with inner.process(BUSYBOX, ["cat"]) as process:
            hypervisor.machines[1].die()
            with pytest.raises(VMDiedError):
                await process.wait()
        assert (await outer.run(BUSYBOX, ["echo", "unharmed"])).stdout == "unharmed\n"


async def test_what_outlives_its_block_says_so(hypervisor: FakeHypervisor) -> None:
    async with Sandbox(hypervisor, FakeFs()) as sandbox:
        async with sandbox.container(BUSYBOX) as container:
            pass
        with pytest.raises(SandboxClosedError, match="container is gone"):
            await container.run(["true"])


async def test_leaving_ends_what_other_tasks_do_in_it(hypervisor: FakeHypervisor) -> None:
    errors: list[BaseException] = []

    async def use(sandbox: Sandbox, started: anyio.Event) -> None:
        try:
            async with sandbox.process(BUSYBOX, ["cat"]) as process:
                started.set()
                await process.wait()
        except SandboxClosedError as error:
            errors.append(error)

    async with anyio.create_task_group() as group, Sandbox(hypervisor, FakeFs()) as sandbox:
        started = anyio.Event()
        group.start_soon(use, sandbox, started)
        await started.wait()
    assert [str(error) for error in errors] == ["this sandbox was left (use it inside its 'async with' block)"]


async def test_an_error_in_the_block_is_its_own(hypervisor: FakeHypervisor) -> None:
    async def fail() -> None:
        async with Sandbox(hypervisor, FakeFs()) as sandbox, sandbox.container(BUSYBOX):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await fail()
    assert list(run_root().glob("[!.]*")) == []


def test_a_sandbox_in_a_thread_s_own_loop() -> None:
    results: list[str] = []

    async def use() -> None:
        async with Sandbox(FakeHypervisor(), FakeFs()) as sandbox:
            results.append((await sandbox.run(BUSYBOX, ["echo", threading.current_thread().name])).stdout)

    threads = [threading.Thread(target=anyio.run, args=(use,), name=f"thread {number}") for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["thread 0\n", "thread 1\n", "thread 2\n"]


def test_one_loop_after_the_other() -> None:
    async def use() -> bool:
        async with Sandbox(FakeHypervisor(), FakeFs()) as sandbox:
            return (await sandbox.run(BUSYBOX, ["true"])).ok

    assert anyio.run(use)
    assert anyio.run(use)


async def test_timings_are_in_order(sb: Sandbox) -> None:
    before = sb.timings
    assert before.first_output is None
    await sb.run(BUSYBOX, ["echo", "x"])
    after = sb.timings
    steps = [after.slot, after.spawned, after.vmm_ready, after.ready, after.first_output]
    assert None not in steps
    assert steps == sorted(step for step in steps if step is not None)
    await sb.run(BUSYBOX, ["echo", "x"])
    assert sb.timings == after, "the first output is the first"


# --- isolation ---


@pytest.fixture
def never_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pykata.isolation, "_warned", False)


@pytest.mark.usefixtures("never_warned")
async def test_emulation_is_warned_of_once() -> None:
    async def enter_two() -> None:
        for _ in range(2):
            async with Sandbox(FakeHypervisor(accel="tcg"), FakeFs()) as sandbox:
                assert sandbox.isolation == "emulated"

    with pytest.warns(EmulationWarning, match="isolation='hardware'") as caught:
        await enter_two()
    (warning,) = caught.list
    assert warning.filename == __file__, "it points at who entered the sandbox"


@pytest.mark.usefixtures("never_warned")
@pytest.mark.parametrize(("accel", "isolation"), [("kvm", None), ("kvm", "hardware"), ("tcg", "emulated")])
async def test_what_was_accepted_or_is_safe_is_not_warned_of(accel: Any, isolation: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with Sandbox(FakeHypervisor(accel=accel), FakeFs(), isolation=isolation):
            pass
    assert caught == []


async def test_hardware_isolation_is_refused_before_anything_starts() -> None:
    hypervisor = FakeHypervisor(accel="tcg")
    with pytest.raises(IsolationError):
        await Sandbox(hypervisor, FakeFs(), isolation="hardware").__aenter__()
    assert hypervisor.machines == []


# --- check ---


async def test_check_tells_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    report = await pykata.check(FakeHypervisor(accel="tcg"))
    assert [item.name for item in report.items][:3] == ["directories", "guest bundle", "hypervisor"]
    assert report.items[2].detail == "fake, tcg: emulated isolation"


async def test_check_reports_what_fails_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:        # undone before the bundle of fakes is
        patch.setenv("PYKATA_BUNDLE", str(tmp_path / "nowhere"))
        patch.setenv("PYKATA_RUN", str(tmp_path / "file" / "run"))
        report = await pykata.check(FakeHypervisor())
    by_name = {item.name: item for item in report.items}
    assert not report.ok
    assert not by_name["directories"].ok
    assert not by_name["guest bundle"].ok
    assert "PYKATA_BUNDLE" in by_name["guest bundle"].remedy
    assert by_name["hypervisor"].ok
    assert not by_name["a command in a virtual machine"].ok


