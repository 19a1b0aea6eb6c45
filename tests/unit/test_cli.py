"""The command line without a virtual machine: a sandbox that is scripted takes the place of the real one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import anyio
import pykata_cli
import pytest
from attrs import define, field, frozen
from pykata_cli.complaint import first_cause, one_line
from pykata_cli.parser import parse
from pykata_cli.progress import CLEAR, ChangingLine, Lines
from pykata_cli.run import sandbox_options
from pykata_cli.streams import environment

import pykata

PYKATA_FAILED = 125


@frozen
class Exited:
    exit_code: int = 0
    oom_killed: bool = False


@define
class Input:
    received: bytearray = field(factory=bytearray)
    closed: anyio.Event = field(factory=anyio.Event)

    async def send(self, data: bytes) -> None:
        self.received += data

    async def aclose(self) -> None:
        self.closed.set()


@define(slots=False)
class ScriptedProcess:
    """Writes what it is told to; then it ends, or waits for a signal that ends it."""

    output: tuple[bytes, ...] = ()
    errors: tuple[bytes, ...] = ()
    exit: Exited | None = field(factory=Exited)
    failure: Exception | None = None
    echo: bool = False
    on_start: Callable[[], None] = lambda: None
    stdin: Input = field(factory=Input)
    signals: list[int] = field(factory=list)
    ended: anyio.Event = field(factory=anyio.Event)
    killed: threading.Event = field(factory=threading.Event)
    needs: int = 1
    """How many signals end it."""

    def __attrs_post_init__(self) -> None:
        self.stdout, self.stderr = self._out(), self._err()

    async def _out(self) -> AsyncIterator[bytes]:
        for piece in self.output:
            yield piece
        if self.echo:
            await self.stdin.closed.wait()
            yield bytes(self.stdin.received)
        if self.exit is None:
            self.on_start()
            await self.ended.wait()

    async def _err(self) -> AsyncIterator[bytes]:
        for piece in self.errors:
            yield piece
        if self.failure is not None:
            raise self.failure

    @property
    def exited(self) -> Exited | None:
        return self.exit

    async def wait(self) -> int:
        if self.exit is None:
            await self.ended.wait()
            return 128 + self.signals[-1]
        return self.exit.exit_code

    async def send_signal(self, number: int) -> None:
        self.signals.append(number)
        if len(self.signals) >= self.needs:
            self.ended.set()

    async def kill(self) -> None:
        self.signals.append(signal.SIGKILL)
        self.ended.set()
        self.killed.set()


class ScriptedSandbox:
    """Takes the place of pykata.Sandbox."""

    process_: ScriptedProcess
    entering: Exception | None = None
    booting: Callable[[], None] | None = None
    asked: dict[str, Any]
    left: bool

    def __init__(self, **options: Any) -> None:
        ScriptedSandbox.asked = {"sandbox": options}
        ScriptedSandbox.left = False

    async def __aenter__(self) -> Self:
        if self.entering is not None:
            raise self.entering
        if ScriptedSandbox.booting is not None:
            ScriptedSandbox.booting()
            await anyio.sleep_forever()
        return self

    async def __aexit__(self, *error: object) -> None:
        ScriptedSandbox.left = True

    @asynccontextmanager
    async def process(self, image: str, cmd: list[str] | None, **options: Any) -> AsyncIterator[ScriptedProcess]:
        ScriptedSandbox.asked |= {"image": image, "cmd": cmd, "process": options}
        yield self.process_

    accel = "tcg"
    isolation = "emulated"
    timings = None
    network = pykata.RunningNetwork(ports=(pykata.Port(80, 8080), pykata.Port(53, 5353, "::1", "udp")))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedProcess]:
    def script(**options: Any) -> ScriptedProcess:
        process = ScriptedProcess(**options)
        monkeypatch.setattr(ScriptedSandbox, "process_", process, raising=False)
        return process

    monkeypatch.setattr(pykata, "Sandbox", ScriptedSandbox)
    monkeypatch.setattr(ScriptedSandbox, "entering", None)
    monkeypatch.setattr(ScriptedSandbox, "booting", None)
    script()
    return script


@pytest.fixture
def stdin() -> Iterator[Callable[[bytes], None]]:
    """Replaces the test's own stdin."""
    saved = os.dup(0)

    def feed(data: bytes) -> None:
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        os.dup2(reader, 0)
        os.close(reader)

    feed(b"")
    yield feed
    os.dup2(saved, 0)
    os.close(saved)


def run(*argv: str) -> int:
    return pykata_cli.main(["run", *argv])


pytestmark = pytest.mark.usefixtures("stdin")
Script = Callable[..., ScriptedProcess]


# --- what is said on the command line ---


@pytest.mark.parametrize(("argv", "image", "cmd"), [
    (["image"], "image", None),
    (["image", "--"], "image", None),
    (["image", "ls"], "image", ["ls"]),
    (["image", "--", "ls", "--", "-v"], "image", ["ls", "--", "-v"]),
    (["image", "sh", "-c", "exit", "--timeout", "3"], "image", ["sh", "-c", "exit", "--timeout", "3"]),
    (["--memory", "1G", "image", "-v"], "image", ["-v"]),
])
def test_image_and_command(scripted: Script, argv: list[str], image: str, cmd: list[str] | None) -> None:
    assert run(*argv) == 0
    assert ScriptedSandbox.asked["image"] == image
    assert ScriptedSandbox.asked["cmd"] == cmd


def test_only_what_was_said_is_passed_on() -> None:
    assert sandbox_options(parse(["run", "image"])) == {"hypervisor": "qemu", "fs": "block", "network": "none"}


def test_everything_can_be_said(scripted: Script) -> None:
    run("--memory", "1G", "--cpus", "2", "--disk", "2G", "--hostname", "h", "--isolation", "emulated",
        "--fs", "block", "--network", "none", "-e", "A=1", "--env", "B=x=y", "-w", "/tmp", "-u", "1:2",
        "--entrypoint", "sh", "image")  # fmt: skip
    assert ScriptedSandbox.asked["sandbox"] == {
        "hypervisor": "qemu", "fs": "block", "network": "none", "memory": "1G", "cpus": 2, "disk": "2G",
        "hostname": "h", "isolation": "emulated",
    }  # fmt: skip
    assert ScriptedSandbox.asked["process"] == {
        "env": {"A": "1", "B": "x=y"}, "cwd": "/tmp", "user": "1:2", "entrypoint": ["sh"], "tty": False,
    }  # fmt: skip


def test_volumes(tmp_path: Path) -> None:
    given = ["--volume", f"{tmp_path}:/data", "--volume", "./x:y:/in:ro", "--volume", "cache:/c"]
    assert sandbox_options(parse(["run", *given, "image"]))["volumes"] == {
        "/data": pykata.Bind(tmp_path), "/in": pykata.Bind("./x:y", readonly=True), "/c": pykata.Named("cache"),
    }  # fmt: skip
    for bad in ("/data", "x:y", ":/data", "a:/b:rw"):
        with pytest.raises(pykata.ConfigError, match="is not SOURCE:PLACE"):
            sandbox_options(parse(["run", "--volume", bad, "image"]))
    with pytest.raises(pykata.ConfigError, match="/c is there twice"):
        sandbox_options(parse(["run", "--volume", "a:/c", "--volume", "b:/c", "image"]))


@pytest.mark.parametrize(("argv", "network"), [
    ([], "none"),
    (["--network", "user"], "user"),
    (["-p", "8080:80"], pykata.Network("user", ports=["8080:80"])),
    (["--allow", "pypi.org", "--deny", "10.0.0.0/8"], pykata.Network("user", allow=["pypi.org"], deny=["10.0.0.0/8"])),
    (["--add-host", "db:10.0.0.5"], pykata.Network("none", hosts={"db": "10.0.0.5"})),
    (["--dns", "1.1.1.1", "--dns-search", "a.example"], pykata.Network("user", dns=["1.1.1.1"], search=["a.example"])),
    (["--network", "user:via=passt,ipv6=true"], pykata.UserNetwork(via="passt", ipv6=True)),
    (["--network", "tcfilter:blue"], pykata.TCFilter("blue")),
    (["--network", "tcfilter:netns=blue,interfaces=eth0+eth1", "-p", "80"],
     pykata.Network(pykata.TCFilter("blue", ("eth0", "eth1")), ports=[80])),
])  # fmt: skip
def test_networks(argv: list[str], network: object) -> None:
    assert sandbox_options(parse(["run", *argv, "image"]))["network"] == network


@pytest.mark.parametrize(("argv", "said"), [
    (["--network", "pigeon:fast"], "'pigeon' takes no options"), (["--network", "user:speed=1"], "no option 'speed'"),
    (["--network", "user:host=maybe"], "neither true nor false"), (["--add-host", "db"], "is not NAME:ADDRESS"),
    (["-p", "http"], "ports:"), (["--allow", "a b"], "allow"),
])  # fmt: skip
def test_networks_that_are_refused(argv: list[str], said: str) -> None:
    with pytest.raises(pykata.ConfigError, match=said):
        sandbox_options(parse(["run", *argv, "image"]))


def test_published_ports_are_told(scripted: Script, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("-p", "80", "image") == 0
    assert "pykata: 127.0.0.1:8080 -> 80/tcp\npykata: [::1]:5353 -> 53/udp\n" in capfd.readouterr().err


def test_options_of_qemu() -> None:
    assert sandbox_options(parse(["run", "--machine", "q35", "image"]))["hypervisor"] == pykata.QEMU(machine="q35")
    with pytest.raises(pykata.ConfigError, match="--machine isn't for other"):
        sandbox_options(parse(["run", "--hypervisor", "other", "--machine", "q35", "image"]))


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "1")
    monkeypatch.delenv("NOBODYS", raising=False)
    assert environment(["A=b=c", "EMPTY=", "OURS", "NOBODYS"]) == {"A": "b=c", "EMPTY": "", "OURS": "1"}


@pytest.mark.parametrize("argv", [
    [], ["walk"], ["run"], ["run", "--memry", "1G", "image"], ["run", "--cpus", "many", "image"], ["guest"],
])
def test_a_wrong_command_line(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        pykata_cli.main(argv)
    assert raised.value.code == PYKATA_FAILED
    said = capfd.readouterr().err
    assert said.startswith("pykata: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["check", "--help"], ["guest", "build", "--help"]])
def test_help(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        pykata_cli.main(argv)
    assert raised.value.code == 0
    assert capfd.readouterr().out.startswith("usage: pykata")


def test_help_imports_nothing_of_pykata() -> None:
    program = "import sys, pykata_cli\ntry: pykata_cli.main(['--help'])\nexcept SystemExit: pass\n"
    program += "print([m for m in ('pykata', 'anyio', 'attrs', 'asyncio') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stderr == "[]\n"


# --- streams ---


def test_output_is_passed_on_as_bytes(scripted: Script, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    scripted(output=(b"\xff\x00", b"out"), errors=(b"err",), exit=Exited(7))
    assert run("image") == 7
    assert capfdbinary.readouterr() == (b"\xff\x00out", b"err")


def test_stdin_is_passed_on(
    scripted: Script, stdin: Callable[[bytes], None], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    stdin(b"x" * 50_000)
    scripted(echo=True)
    assert run("image") == 0
    assert capfdbinary.readouterr().out == b"x" * 50_000


def test_stdin_that_is_a_file(
    scripted: Script, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "in").write_bytes(b"content")
    with (tmp_path / "in").open("rb") as file:
        os.dup2(file.fileno(), 0)
    scripted(echo=True)
    assert run("image") == 0
    assert capfdbinary.readouterr().out == b"content"


@pytest.mark.parametrize(("options", "received"), [([], b""), (["-i"], b"typed\n")])
def test_a_terminal_is_read_when_asked_for(scripted: Script, options: list[str], received: bytes) -> None:
    master, slave = os.openpty()
    os.dup2(slave, 0)
    os.write(master, b"typed\n\x04")
    process = scripted(echo=True)
    assert run(*options, "image") == 0
    assert bytes(process.stdin.received) == received
    os.close(slave)
    os.close(master)


def test_nobody_reads_the_output(scripted: Script, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    saved = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    scripted(output=(b"lost",), exit=None)
    try:
        assert run("image") == 128 + signal.SIGPIPE
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert ScriptedSandbox.left


# --- how it ends ---


def test_a_slow_reader_loses_nothing_by_a_timeout(scripted: Script) -> None:
    data = os.urandom(300_000)
    reader, writer = os.pipe()
    saved = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    late = scripted(output=(data,), exit=None)
    received = bytearray()

    def read() -> None:
        late.killed.wait()
        while piece := os.read(reader, 65536):
            received.extend(piece)

    slow = threading.Thread(target=read)
    slow.start()
    try:
        assert run("--timeout", "0.01", "image") == 124
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        slow.join()
        os.close(reader)
    assert bytes(received) == data


def test_a_guest_that_says_nothing_after_the_kill(scripted: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(ScriptedProcess):
        async def kill(self) -> None:
            pass

    monkeypatch.setattr("pykata_cli.streams.DRAIN", 0.01)
    ScriptedSandbox.process_ = Silent(output=(b"partial",), exit=None)
    assert run("--timeout", "0.01", "image") == 124
    assert ScriptedSandbox.left


def test_timeout(scripted: Script, capfd: pytest.CaptureFixture[str]) -> None:
    process = scripted(output=(b"partial",), exit=None)
    assert run("--timeout", "0.01", "image") == 124
    assert process.signals == [signal.SIGKILL]
    assert capfd.readouterr() == ("partial", "pykata: the command was killed: its 0.01 s were over\n")


def test_out_of_memory(scripted: Script, capfd: pytest.CaptureFixture[str]) -> None:
    scripted(exit=Exited(137, oom_killed=True))
    assert run("image") == 137
    assert "memory ran out" in capfd.readouterr().err


def test_the_machine_dies(scripted: Script, capfd: pytest.CaptureFixture[str]) -> None:
    scripted(output=(b"partial",), failure=pykata.VMDiedError("QEMU was killed by SIGKILL", console="a\nb"))
    assert run("image") == PYKATA_FAILED
    assert capfd.readouterr() == ("partial", "pykata: QEMU was killed by SIGKILL\n")


def test_an_error_is_one_line(
    scripted: Script, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error = pykata.ImageNotFoundError("there is no\nimage \x1b[31mx", hint="make one")
    monkeypatch.setattr(ScriptedSandbox, "entering", error)
    assert run("image") == PYKATA_FAILED
    assert capfd.readouterr().err == "pykata: there is no image ?[31mx (make one)\n"


def test_verbose_tells_the_whole_story(
    scripted: Script, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ScriptedSandbox, "entering", pykata.BootError("no boot", console="line 1\nline 2"))
    assert run("-v", "image") == PYKATA_FAILED
    said = capfd.readouterr().err
    assert "Traceback" in said
    assert "    line 1\n    line 2\n" in said
    assert said.endswith("pykata: no boot\n")


def test_a_bug_is_called_one(
    scripted: Script, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ScriptedSandbox, "entering", TypeError("oops"))
    assert run("image") == PYKATA_FAILED
    assert capfd.readouterr().err == "pykata: this is a bug: TypeError: oops (-v shows where)\n"


def test_ours_is_first_among_several_errors() -> None:
    ours = pykata.VMDiedError("died")
    group = ExceptionGroup("", [OSError("x"), ExceptionGroup("", [ours])])
    assert first_cause(group) is ours
    assert one_line(ours) == "died"


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_the_commands(scripted: Script, number: signal.Signals) -> None:
    process = scripted(exit=None, on_start=lambda: os.kill(os.getpid(), number))
    assert run("image") == 128 + number
    assert process.signals == [number]
    assert ScriptedSandbox.left


def test_the_second_interrupt_kills(scripted: Script) -> None:
    class Stubborn(ScriptedProcess):
        async def send_signal(self, number: int) -> None:
            await super().send_signal(number)
            os.kill(os.getpid(), signal.SIGINT)

    process = Stubborn(exit=None, needs=2, on_start=lambda: os.kill(os.getpid(), signal.SIGINT))
    ScriptedSandbox.process_ = process
    assert run("image") == 128 + signal.SIGKILL
    assert process.signals == [signal.SIGINT, signal.SIGKILL]


def test_the_third_interrupt_does_not_wait(scripted: Script) -> None:
    class Dead(ScriptedProcess):
        async def send_signal(self, number: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            await anyio.sleep_forever()

        async def kill(self) -> None:
            await self.send_signal(signal.SIGKILL)

    ScriptedSandbox.process_ = Dead(exit=None, on_start=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run("image") == 128 + signal.SIGINT
    assert ScriptedSandbox.left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_boot_ends_it(
    scripted: Script, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(ScriptedSandbox, "booting", lambda: os.kill(os.getpid(), number))
    assert run("image") == 128 + number


# --- check and guest ---


def test_check(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    async def check() -> pykata.CheckReport:
        return pykata.CheckReport((
            pykata.CheckItem("hypervisor", True, "qemu, tcg"),
            pykata.CheckItem("guest", False, "no bundle", "build it"),
        ))

    monkeypatch.setattr(pykata, "check", check)
    assert pykata_cli.main(["check"]) == 1
    assert capfd.readouterr().out == (
        "ok    hypervisor  qemu, tcg\n"
        "FAIL  guest       no bundle\n"
        "                  build it\n"
    )  # fmt: skip


@frozen
class FakeBundle:
    path: Path = Path("/cache/x86_64-0123")
    arch: str = "x86_64"
    hash: str = "0123"
    manifest: Mapping[str, Any] = field(factory=lambda: {"outputs": {"vmlinux": {"size": 3 * 2**20}}})


def test_guest_build(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    async def build_bundle(*, progress: Callable[..., None], force: bool) -> FakeBundle:
        assert force
        progress("kernel", 1, 4, "CC a.o")
        progress("kernel", 4, 4, "LD vmlinux")
        return FakeBundle()

    monkeypatch.setattr(pykata, "build_bundle", build_bundle)
    assert pykata_cli.main(["guest", "build", "--force"]) == 0
    out, err = capfd.readouterr()
    assert "x86_64-0123" in out
    assert [line.split(" s  ")[1] for line in err.splitlines()] == ["kernel 25%  CC a.o", "kernel 100%  LD vmlinux"]


def test_guest_build_is_cleaned_up_when_it_is_told_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[bool] = []

    async def build_bundle(**_options: object) -> FakeBundle:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await anyio.sleep_forever()
            return FakeBundle()
        finally:
            cleaned.append(True)

    monkeypatch.setattr(pykata, "build_bundle", build_bundle)
    assert pykata_cli.main(["guest", "build"]) == 128 + signal.SIGTERM
    assert cleaned == [True]


def test_guest_info(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pykata, "find_bundle", FakeBundle)
    assert pykata_cli.main(["guest", "info"]) == 0
    assert "vmlinux 3.0 MiB" in capfd.readouterr().out


def test_progress_elsewhere_is_a_line_for_each_tenth() -> None:
    out = io.StringIO()
    show = Lines(out)
    for done in range(101):
        show("kernel", done, 100, "CC x.o")
    show("lock", 0, 0, "waiting")
    show("lock", 0, 0, "waiting")
    assert len(out.getvalue().splitlines()) == 12


def test_progress_on_a_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = io.StringIO()
    show = ChangingLine(out)
    show("kernel", 1, 4, "CC a.o")
    show("agent", 1, 2, "Compiling " + "x" * 100)
    assert "\n" not in out.getvalue()
    lines = ["kernel 25%  CC a.o", "kernel 25%  agent 50%  Compiling " + "x" * 100]
    assert out.getvalue().split(CLEAR)[1:] == [line[:39] for line in lines]


def test_version() -> None:
    program = "import sys, pykata_cli; sys.exit(pykata_cli.main(['--version']))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("pykata 0.")
    assert json.dumps(done.stderr) == '""'


# --- detached sandboxes: what needs none ---


@pytest.mark.parametrize(("text", "parts"), [
    ("box:/a/b", ("box", "/a/b")), ("box:", ("box", ".")), ("box:a:b", ("box", "a:b")), ("./a:b", None), ("/a:b", None),
    ("file", None), ("", None),
])
def test_paths_of_sandboxes(text: str, parts: tuple[str, str] | None) -> None:
    from pykata_cli.cp import split

    assert split(text) == parts


@pytest.mark.parametrize(("text", "number"), [("9", 9), ("KILL", 9), ("sigterm", 15), ("hup", 1)])
def test_signals_by_name_and_number(text: str, number: int) -> None:
    from pykata_cli.kill import signal_number

    assert signal_number(text) == number
    with pytest.raises(pykata.ConfigError, match="NONSENSE"):
        signal_number("NONSENSE")


def test_the_table_of_sandboxes(capsys: pytest.CaptureFixture[str]) -> None:
    from pykata_cli.ps import age, print_table, row, status

    one = pykata.Detached(name="n", phase="running", image="image", args=("sh", "-c", "x" * 100), created=0)
    assert row(one)[4] == "sh -c " + "x" * 33 + "…"
    print_table([row(one)])
    assert "\n" not in capsys.readouterr().out.rstrip("\n")
    assert [age(seconds) for seconds in (-1, 5, 65, 7200, 200_000)] == ["0 s", "5 s", "1 min", "2 h", "2 d"]
    assert status(pykata.Detached(name="n", phase="ended", exit_code=3)) == "ended (3)"
    assert status(pykata.Detached(name="n", phase="ended", reason="vm_died")) == "ended (vm_died)"
    assert status(pykata.Detached(name="n", phase="lost")) == "lost (keeper killed)"


def test_what_a_terminal_would_obey_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    from pykata_cli.ps import print_table

    print_table([["\x1b]0;evil\x07", "b"]])
    assert capsys.readouterr().out == "\\x1b]0;evil\\x07  b\n"


@pytest.mark.parametrize("argv", [("--name", "x"), ("--own-command",), ("--detach", "--timeout", "3"), ("-d", "-i")])
def test_options_that_exclude_each_other(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv, "image") == PYKATA_FAILED
    assert "--detach" in capsys.readouterr().err
