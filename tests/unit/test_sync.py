"""The synchronous face: everything over fakes, in plain threads and inside a running loop."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import pytest
from anyio.from_thread import BlockingPortal, BlockingPortalProvider

import pykata
import pykata.sync
from pykata import CommandFailedError, Completed, ConfigError, SandboxClosedError, VMDiedError
from pykata.sync import Container, Process, Sandbox, bridge
from pykata.sync.facade import facade
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"
ROOT = Path(__file__).resolve().parents[2]


async def count(process: FakeProcess) -> int:
    for number in range(3):
        await process.write(b"%d\n" % number)
    await process.write_error(b"done\n")
    return 4


async def interrupting(process: FakeProcess) -> int:
    """Ctrl-C, from another thread than the one that waits."""
    os.kill(os.getpid(), signal.SIGINT)
    await process.gone()
    return 0


COMMANDS = {"count": count, "interrupting": interrupting}


def fake(**options: Any) -> FakeHypervisor:
    return FakeHypervisor(commands=COMMANDS, **options)


def sandbox(**options: Any) -> Sandbox:
    return Sandbox(fake(**options), FakeFs())


def loops() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "portal" in thread.name]


# --- use ---


def test_a_command() -> None:
    with sandbox() as sb:
        done = sb.run(BUSYBOX, ["count"])
        assert_type(done, Completed)
        assert (done.stdout, done.stderr, done.exit_code) == ("0\n1\n2\n", "done\n", 4)
        with pytest.raises(CommandFailedError):
            sb.run(BUSYBOX, ["count"], check=True)
        assert sb.accel == "kvm"
        assert sb.features.name == "fake"
        assert sb.options.memory == 256
    assert loops() == []
    with pytest.raises(SandboxClosedError):
        sb.run(BUSYBOX, ["true"])


def test_containers_and_processes() -> None:
    with sandbox() as sb, sb.container(BUSYBOX) as container:
        assert_type(container, Container)
        assert container.id
        assert container.image.reference == BUSYBOX
        with container.process(["cat"]) as process:
            assert_type(process, Process)
            process.stdin.send(b"one")
            pieces = iter(process.stdout)
            assert next(pieces) == b"one"
            process.stdin.send(b"two")
            process.stdin.aclose()
            assert process.stdout.read() == b"two"
            assert (process.wait(), process.returncode) == (0, 0)
        with sb.process(BUSYBOX, ["count"]) as process:
            assert list(process.stdout) == [b"0\n", b"1\n", b"2\n"]
            assert list(process.stderr) == [b"done\n"]
        with sb.process(BUSYBOX, ["sleep", "1000"]) as process:
            process.terminate()
            assert process.wait() == 128 + signal.SIGTERM


def test_bad_arguments_are_refused_at_once() -> None:
    with pytest.raises(ConfigError):
        Sandbox(memory="much")
    with sandbox() as sb, pytest.raises(ConfigError):
        sb.run(BUSYBOX, [])
    assert loops() == []


def test_check() -> None:
    report = pykata.sync.check(fake())
    assert_type(report, pykata.CheckReport)
    assert report.items
    assert loops() == []


def test_inside_a_running_loop() -> None:
    async def cell() -> str:
        with sandbox() as sb:
            return sb.run(BUSYBOX, ["echo", "hello"]).stdout

    assert asyncio.run(cell()) == "hello\n"


def test_detached_ones() -> None:
    handle = sandbox().detach("synchronous", BUSYBOX, ["count"])
    ended = handle.wait()
    assert ended.exit_code == 4
    assert pykata.sync.list_detached() == [ended]
    assert pykata.sync.find_detached("synchronous") == ended
    assert [piece.data for piece in ended.logs() if piece.stream == "stdout"] == [b"0\n", b"1\n", b"2\n"]
    for piece in ended.logs(follow=True):
        assert piece.data
        break
    ended.remove()
    handle = sandbox().detach("synchronous", BUSYBOX)
    with Sandbox.connect("synchronous") as sb:
        assert_type(sb, Sandbox)
        assert sb.main.run(["echo", "hello"]).stdout == "hello\n"
    handle.stop()
    assert pykata.sync.collect_garbage() == []
    assert loops() == []


def test_the_names_of_asyncio() -> None:
    with sandbox() as sb, sb.process(BUSYBOX, ["cat"]) as process:
        process.stdin.write(b"one\n")      # from this thread, into the loop's
        assert process.stdout.readline() == b"one\n"
        process.stdin.write(b"two")
        process.stdin.close()
        assert process.communicate() == (b"two", b"")
        assert (process.returncode, process.reason) == (0, "exit")


def test_a_walk_goes_where_the_loop_lets_it() -> None:
    with sandbox() as sb, sb.container(BUSYBOX) as box:
        for made in ("/t/a/b", "/t/c/d", "/t/e"):
            box.files.mkdir(made, parents=True)
        seen = []
        for path, directories, _ in box.files.walk("/t"):
            seen.append(str(path))
            directories[:] = [entry for entry in directories if entry.name != "a"]
        assert seen == ["/t", "/t/c", "/t/c/d", "/t/e"]
        walk = box.files.walk("/t")
        next(walk)
        box.files.remove("/t/e")
        assert "/t/e" not in [str(path) for path, _, _ in walk]


def test_the_errors_of_a_walk_are_told_in_the_caller_s_thread() -> None:
    told: list[tuple[int, bool]] = []
    with sandbox() as sb, sb.container(BUSYBOX) as box:

        def on_error(error: pykata.FileError) -> None:
            told.append((threading.get_ident(), box.files.exists("/tmp")))

        assert list(box.files.walk("/none", on_error=on_error)) == []
    assert told == [(threading.get_ident(), True)]


class Hooked:
    """As a Template has its setup."""

    def __init__(self, setup: Any, other: Any = None) -> None:
        self.setup, self.other = setup, other

    async def go(self, given: Any) -> Any:
        return await self.setup(given)


def test_hooks_of_a_constructor_are_given_what_is_synchronous() -> None:
    async def asynchronous(given: object) -> type:
        return type(given)

    hooked: Any = facade(Hooked)
    with sandbox() as sb, sb.container(BUSYBOX) as box:
        one = hooked(setup=lambda given: given.run(["echo", "hi"]).stdout + given.files.read_text("/f"), other=box)
        box.files.write_text("/f", "f")
        assert one.go(box) == "hi\nf"
        assert isinstance(one._of.other, pykata.Container)
        assert hooked(setup=asynchronous).go(box) is pykata.Container


def test_a_pool_takes_a_template() -> None:
    def warm_up(sb: Sandbox) -> None:
        sb.run(BUSYBOX, ["true"])

    with pytest.raises(ConfigError, match="size"):
        pykata.sync.Pool(pykata.sync.Template(BUSYBOX, hypervisor="qemu"), size=0, warm_up=warm_up)


# --- callbacks ---


def test_callbacks_run_in_the_caller_s_thread() -> None:
    said: list[tuple[int, bytes]] = []
    with sandbox() as sb:
        sb.run(BUSYBOX, ["count"], on_stdout=lambda data: said.append((threading.get_ident(), data)))
        assert b"".join(data for _, data in said) == b"0\n1\n2\n"
        assert {thread for thread, _ in said} == {threading.get_ident()}


def test_a_callback_may_use_the_sandbox() -> None:
    with sandbox() as sb:
        inner: list[str] = []
        sb.run(BUSYBOX, ["echo", "a"], on_stdout=lambda data: inner.append(sb.run(BUSYBOX, ["echo", "b"]).stdout))
        assert inner == ["b\n"]


def test_an_asynchronous_callback_is_awaited() -> None:
    said = []

    async def listen(data: bytes) -> None:
        await asyncio.sleep(0)
        said.append(data)

    with sandbox() as sb:
        sb.run(BUSYBOX, ["echo", "a"], on_stdout=listen)
    assert said == [b"a\n"]


def test_an_error_of_a_callback_ends_the_call() -> None:
    def fail(data: bytes) -> None:
        raise LookupError("no")

    with sandbox() as sb:
        with pytest.raises(LookupError, match="no"):
            sb.run(BUSYBOX, ["echo", "a"], on_stdout=fail)
        assert sb.run(BUSYBOX, ["true"]).ok


# --- errors and interrupts ---


def test_an_error_in_the_block_is_the_one_that_is_raised() -> None:
    error = LookupError("mine")
    with pytest.raises(LookupError) as caught, sandbox() as sb, sb.container(BUSYBOX):
        raise error
    assert caught.value is error
    assert loops() == []


def test_an_error_of_the_start() -> None:
    with pytest.raises(pykata.BootError, match="told to by a test"), sandbox(faults={"boot": "die"}):
        pass
    assert loops() == []


def test_a_machine_that_dies() -> None:
    with sandbox(faults={"Run": "die"}) as sb, pytest.raises(VMDiedError):
        sb.run(BUSYBOX, ["true"])


def test_ctrl_c_cancels_a_call_and_the_sandbox_is_of_use() -> None:
    hypervisor = fake()
    with Sandbox(hypervisor, FakeFs()) as sb:
        with pytest.raises(KeyboardInterrupt):
            sb.run(BUSYBOX, ["interrupting"])
        assert not hypervisor.machines[0].agent.containers, "its clean-up is over"
        assert sb.run(BUSYBOX, ["true"]).ok


def test_ctrl_c_in_a_callback() -> None:
    def interrupt(data: bytes) -> None:
        signal.raise_signal(signal.SIGINT)

    with sandbox() as sb:
        with pytest.raises(KeyboardInterrupt):
            sb.run(BUSYBOX, ["count"], on_stdout=interrupt)
        assert sb.run(BUSYBOX, ["true"]).ok


def test_ctrl_c_in_the_block() -> None:
    with pytest.raises(KeyboardInterrupt), sandbox() as sb, sb.process(BUSYBOX, ["sleep", "1000"]):
        signal.raise_signal(signal.SIGINT)
    assert loops() == []


def interrupted_boot(timer: threading.Timer) -> None:
    timer.start()
    with sandbox(faults={"boot": "hang"}):
        pass


@pytest.mark.parametrize("after", [0.0, 0.01, 0.05, 0.2])
def test_ctrl_c_while_it_boots(after: float) -> None:
    timer = threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        interrupted_boot(timer)
    timer.join()
    assert loops() == []


def enter() -> None:
    with sandbox():
        pass


@pytest.mark.parametrize("use", [enter, pykata.sync.list_images])
def test_ctrl_c_while_its_loop_starts(use: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(BlockingPortalProvider):
        def __enter__(self) -> BlockingPortal:
            portal = super().__enter__()
            signal.raise_signal(signal.SIGINT)
            return portal

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(bridge, "_loop", Interrupted(backend="asyncio"))
        with pytest.raises(KeyboardInterrupt):
            use()
    assert loops() == []
    assert signal.getsignal(signal.SIGINT) is before
    enter()


# --- threads, and the end of the program ---


def test_many_threads_share_a_sandbox() -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = sb.run(BUSYBOX, ["echo", str(number)]).stdout

    with sandbox() as sb:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: f"{number}\n" for number in range(8)}


def test_sandboxes_in_several_threads() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                with sandbox() as sb:
                    assert sb.run(BUSYBOX, ["true"]).ok
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert loops() == []


def test_they_may_be_left_in_another_order_and_by_another_thread() -> None:
    one, two = sandbox(), sandbox()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert two.run(BUSYBOX, ["true"]).ok
    thread = threading.Thread(target=two.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert loops() == []


PROGRAM = """
import threading
from tests.unit import test_sync as t
sb = t.sandbox()
sb.__enter__()
process = sb.process(t.BUSYBOX, ["sleep", "1000"])
process.__enter__()
print("entered", flush=True)
"""


@pytest.mark.parametrize("ending", ["", "import sys; sys.exit(3)", "raise LookupError", "del sb, process"])
def test_what_is_open_at_the_end_of_the_program_is_left(ending: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + ending], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.stdout == b"entered\n"
    assert done.returncode == {"": 0, "import sys; sys.exit(3)": 3, "raise LookupError": 1}.get(ending, 0)
    said = [line for line in done.stderr.decode().splitlines() if "Error" in line]
    assert said == (["LookupError"] if "raise" in ending else [])


# --- the same names, the same signatures ---


CLASSES = ["Background", "Container", "Detached", "Files", "Pool", "Process", "Sandbox", "Template"]


def test_the_stub_is_current() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        generate = importlib.import_module("generate_sync").generate
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    stub = Path(pykata.sync.__file__).with_suffix(".pyi").read_text()
    assert stub == generate(), "run: python scripts/generate_sync.py"


@pytest.mark.parametrize("name", CLASSES)
def test_the_same_names(name: str) -> None:
    from pykata.sync.facade import HIDDEN

    asynchronous, synchronous = getattr(pykata, name), getattr(pykata.sync, name)
    public = {member for member in vars(asynchronous) if not member.startswith("_")} - HIDDEN
    functions = {member for member in public if callable(getattr(asynchronous, member))}
    assert functions <= set(vars(synchronous))
    for member in functions:
        mirrored = getattr(synchronous, member)
        assert inspect.signature(mirrored) == inspect.signature(getattr(asynchronous, member))
        assert inspect.getdoc(mirrored) == inspect.getdoc(getattr(asynchronous, member))
        assert not inspect.iscoroutinefunction(mirrored)


def test_what_is_not_public_stays_so() -> None:
    with sandbox() as sb, sb.process(BUSYBOX, ["true"]) as process:
        for name in ("_running", "leave", "advance", "nothing"):
            with pytest.raises(AttributeError):
                getattr(process, name)
