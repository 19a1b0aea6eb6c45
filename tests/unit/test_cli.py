"""The command line without a virtual machine: a sandbox that is scripted takes the place of the real one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import pykata_cli
import pytest
from attrs import field, frozen
from pykata_cli.networks import logged
from pykata_cli.parser import parse
from pykata_cli.progress import CLEAR, ChangingLine, Lines, progress
from pykata_cli.run import sandbox_options
from pykata_cli.streams import environment

import pykata
from tests.unit.scripted import Script, ScriptedSandbox, run
from tests.unit.scripted import scripted as scripted
from tests.unit.scripted import stdin as stdin

PYKATA_FAILED = 125

pytestmark = pytest.mark.usefixtures("stdin")


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


INTERRUPTED = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from pykata_cli import main
sys.exit(main(["check"]))
"""


@pytest.mark.parametrize("module", ["pykata_cli.cli", "argparse", "anyio", "pykata_cli.check", "pykata.probe"])
def test_an_interrupt_while_modules_are_imported_is_quiet(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, module], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@frozen
class Events:
    """A network whose events end when its sandbox is left."""

    left: anyio.Event = field(factory=anyio.Event)

    async def events(self) -> AsyncIterator[pykata.NetworkEvent]:
        yield EVENT
        await self.left.wait()
        yield EVENT


EVENT = pykata.NetworkEvent(time=1.0, action="denied", protocol="tcp")


async def test_the_last_events_of_a_network_are_logged(tmp_path: Path) -> None:
    events = Events()
    async with logged(str(tmp_path / "log")) as log:
        log(events)  # type: ignore[arg-type]
        events.left.set()
    assert [json.loads(line)["count"] for line in (tmp_path / "log").read_text().splitlines()] == [1, 1]
    with pytest.raises(IsADirectoryError):
        async with logged(str(tmp_path)) as log:
            log(events)  # type: ignore[arg-type]


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
    *(["run", f"--timeout={seconds}", "image"] for seconds in ("nan", "0", "-1", "inf", "soon")),
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
    architecture: str = "x86_64"
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


def test_a_terminal_is_no_place_for_a_tar(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.isatty", lambda descriptor: True)
    assert pykata_cli.main(["cp", "box:/a", "-"]) == PYKATA_FAILED
    assert "is a terminal" in capfd.readouterr().err


def test_a_name_that_is_empty_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    assert pykata_cli.main(["run", "-d", "--name", "", "--isolation", "emulated", "builtin:busybox"]) == PYKATA_FAILED
    assert "name=''" in capfd.readouterr().err


@pytest.mark.parametrize(("text", "number"), [("9", 9), ("KILL", 9), ("sigterm", 15), ("hup", 1)])
def test_signals_by_name_and_number(text: str, number: int) -> None:
    from pykata_cli.kill import signal_number

    assert signal_number(text) == number
    for wrong in ("NONSENSE", "²", "9" * 5000):
        with pytest.raises(pykata.ConfigError, match=wrong):
            signal_number(wrong)


def test_the_table_of_sandboxes(capsys: pytest.CaptureFixture[str]) -> None:
    from pykata_cli.ps import row, status
    from pykata_cli.tables import age, print_table

    one = pykata.Detached(name="n", phase="running", image="image", args=("sh", "-c", "x" * 100), created=0)
    assert row(one)[4] == "sh -c " + "x" * 33 + "…"
    print_table([row(one)])
    assert "\n" not in capsys.readouterr().out.rstrip("\n")
    assert [age(seconds) for seconds in (-1, 5, 65, 7200, 200_000)] == ["0 s", "5 s", "1 min", "2 h", "2 d"]
    assert status(pykata.Detached(name="n", phase="ended", exit_code=3)) == "ended (3)"
    assert status(pykata.Detached(name="n", phase="ended", exit_code=0, lost="why")) == "ended (0, files lost)"
    assert status(pykata.Detached(name="n", phase="ended", reason="vm_died")) == "ended (vm_died)"
    assert status(pykata.Detached(name="n", phase="lost")) == "lost (keeper killed)"


def test_what_a_terminal_would_obey_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    from pykata_cli.tables import print_table

    print_table([["\x1b]0;evil\x07", "b"]])
    assert capsys.readouterr().out == "\\x1b]0;evil\\x07  b\n"


@pytest.mark.parametrize("argv", [("--name", "x"), ("--own-command",), ("--detach", "--timeout", "3"), ("-d", "-i")])
def test_options_that_exclude_each_other(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv, "image") == PYKATA_FAILED
    assert "--detach" in capsys.readouterr().err


# --- what is printed, when it can't be ---


def cli(*argv: str, redirected: str, unbuffered: bool = False) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, its descriptors as the shell has them after ``redirected``."""
    program = [sys.executable, *(["-u"] if unbuffered else []), "-m", "pykata_cli", *argv]
    return subprocess.run(["sh", "-c", f'exec "$@" {redirected}', "sh", *program], capture_output=True, text=True,
                          timeout=600)


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("argv", [["--version"], ["ps"], ["run", "--help"]])
def test_stdout_that_is_full(argv: list[str], unbuffered: bool) -> None:
    done = cli(*argv, redirected=">/dev/full", unbuffered=unbuffered)
    assert (done.returncode, done.stderr) == (125, "pykata: can't write to stdout: No space left on device\n")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("argv", [["--version"], ["ps"], ["run", "--help"]])
def test_stdout_that_nobody_reads(argv: list[str], unbuffered: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, *(["-u"] if unbuffered else []), "-m", "pykata_cli", *argv]
    with os.fdopen(writer) as out:
        done = subprocess.run(program, stdout=out, stderr=subprocess.PIPE, text=True, check=False, timeout=600)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_progress_that_nobody_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    full = io.TextIOWrapper(io.BufferedWriter(io.FileIO("/dev/full", "w")))
    monkeypatch.setattr(sys, "stderr", full)
    with progress(full) as show:
        show("kernel", 1, 2, "CC mm/slub.o")
        show("kernel", 2, 2, "linked")
    sys.stderr.close()      # something else that may be written
    with pytest.raises(OSError, match="No space left"):
        full.close()


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_stderr_that_cant_be_written(redirected: str) -> None:
    done = cli("run", "--cpus", "0", "image", redirected=redirected)
    assert (done.returncode, done.stdout) == (125, "")


def test_streams_that_are_closed() -> None:
    assert cli("ps", redirected="<&- >&- 2>&-").returncode == 0
    program = "import os, sys; from pykata_cli.printing import open_streams; open_streams(); "
    program += "print('there', file=sys.stderr); os.write(1, b'out')"
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "out"


def test_who_reads_the_list_of_a_command_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def left(arguments: object) -> int:
        raise BaseExceptionGroup("of a task group", [BrokenPipeError(32, "Broken pipe")])

    monkeypatch.setattr("pykata_cli.ps.command", left)
    assert pykata_cli.main(["ps"]) == 128 + signal.SIGPIPE


def test_a_wrong_option_names_the_help_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pykata_cli.main(["run", "--memry", "image"])
    assert capsys.readouterr().err == "pykata: unrecognized arguments: --memry (try: pykata run --help)\n"


@pytest.mark.parametrize("command", [
    "run", "exec", "ps", "stop", "kill", "logs", "cp", "stats", "rm", "gc", "check", "guest", "guest build",
    "guest info", "pull", "images", "rmi", "build", "push", "save", "load", "volumes",
    "volumes rm",
])
def test_each_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pykata_cli.main([*command.split(), "--help"])
    examples = capsys.readouterr().out.partition("\nexamples:\n")[2]
    assert f"pykata {command}" in examples
