"""What flows through the command line, how it ends, and signals; over a sandbox that is scripted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from pykata_cli.complaint import first_cause, one_line

import pykata
from tests.unit.scripted import Exited, Script, ScriptedProcess, ScriptedSandbox, run
from tests.unit.scripted import scripted as scripted
from tests.unit.scripted import stdin as stdin

PYKATA_FAILED = 125

pytestmark = pytest.mark.usefixtures("stdin")


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


def test_output_that_cannot_be_written(scripted: Script, capfd: pytest.CaptureFixture[str]) -> None:
    saved, full = os.dup(1), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.close(full)
    scripted(output=(b"lost",), exit=None)
    try:
        assert run("image") == PYKATA_FAILED
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert capfd.readouterr().err == "pykata: can't write to stdout: No space left on device\n"


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


@pytest.mark.parametrize(("code", "told"), [(0, 125), (3, 3)])
def test_lost_files(scripted: Script, capfd: pytest.CaptureFixture[str], code: int, told: int) -> None:
    scripted(output=(b"out",), exit=Exited(code), lost=pykata.ShareLostError("files of the host are lost"))
    assert run("image") == told
    assert capfd.readouterr() == ("out", "pykata: files of the host are lost\n")


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
