"""The command line for real: the program as a user starts it, with a virtual machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PYKATA = [sys.executable, "-m", "pykata_cli"]
RUN = [*PYKATA, "run", "--isolation", "emulated", "builtin:busybox", "--"]


def pykata(*argv: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PYKATA, *argv], input=stdin, capture_output=True, check=False)


def run(*cmd: str, options: tuple[str, ...] = (), stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return pykata("run", "--isolation", "emulated", *options, "builtin:busybox", "--", *cmd, stdin=stdin)


@contextmanager
def started(*cmd: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that has written its first line, ``ready``."""
    process = subprocess.Popen([*RUN, *cmd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def test_a_missing_image_is_told_before_anything_starts() -> None:
    for options in ([], ["--detach", "--name", "never"]):
        done = pykata("run", "-v", "--isolation", "emulated", *options, "builtin:nothing", "--", "true")
        assert done.returncode == 125
        assert b"nothing" in done.stderr
        assert b"-nodefaults" not in done.stderr
        assert b"pykata.keeper" not in done.stderr
    assert b"-nodefaults" in pykata("run", "-v", "--isolation", "emulated", "builtin:busybox", "--", "true").stderr


def test_output_and_exit_code() -> None:
    done = run("sh", "-c", "printf 'a\\0b'; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"a\0b", b"err\n")


def test_stdin() -> None:
    data = os.urandom(300_000)
    done = run("md5sum", stdin=data)
    assert done.stdout.split()[0].decode() == subprocess.check_output(["md5sum"], input=data).split()[0].decode()


def test_a_lot_of_output() -> None:
    done = run("sh", "-c", "head -c 3000000 /dev/zero; echo end >&2")
    assert len(done.stdout) == 3_000_000
    assert done.stderr == b"end\n"


def test_conversation() -> None:
    with started("sh", "-c", "echo ready; while read line; do echo got $line; done") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for word in (b"one", b"two"):
            process.stdin.write(word + b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"got " + word + b"\n"
        process.stdin.close()
        assert process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_command(number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo got {name}; exit 5' {name}; echo ready; while :; do sleep 0.1; done"
    with started("sh", "-c", script) as process:
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.read() == f"got {name}\n".encode()
        assert process.wait() == 5


def test_the_second_interrupt_kills() -> None:
    with started("sh", "-c", "trap 'echo ready' INT; echo ready; while :; do sleep 0.1; done") as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 128 + signal.SIGKILL


def test_a_signal_during_the_boot() -> None:
    with subprocess.Popen([*PYKATA, "run", "-v", "builtin:busybox"], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert any(b"spawn" in line for line in process.stderr)
        process.terminate()
        process.stderr.read()
        assert process.wait() == 128 + signal.SIGTERM


def test_killed_itself_it_leaves_nothing_that_runs() -> None:
    # nothing_left looks for the processes of the killed one; its run directory can't be removed by a dead program.
    from pykata.host import abandoned_run_dirs

    with started("sh", "-c", "echo ready; sleep 1000") as process:
        process.kill()
        process.wait()
    for path in abandoned_run_dirs():
        shutil.rmtree(path)


def test_timeout_keeps_the_output() -> None:
    for seconds in ("1", "10", "60"):         # a slow machine needs more time for what is to be kept
        done = run("sh", "-c", "echo partial; sleep 1000", options=("--timeout", seconds))
        assert done.returncode == 124
        assert done.stderr == f"pykata: the command was killed: its {seconds} s were over\n".encode()
        if done.stdout:
            break
    assert done.stdout == b"partial\n"


def test_nobody_reads_the_output() -> None:
    with started("sh", "-c", "echo ready; while :; do echo more; done") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait() == 128 + signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_out_of_memory() -> None:
    done = run("tail", "/dev/zero", options=("--memory", "128M"))
    assert done.returncode == 137
    assert b"memory ran out" in done.stderr


def test_environment_directory_user() -> None:
    done = run("sh", "-c", "echo $A $B; pwd; id -u", options=("-e", "A=1", "-e", "B=x y", "-w", "/tmp", "-u", "nobody"))
    assert done.stdout == b"1 x y\n/tmp\n65534\n"


@pytest.mark.parametrize(("cmd", "code"), [(("there-is-none",), 127), (("/etc/passwd",), 126)])
def test_a_command_that_cannot_start(cmd: tuple[str, ...], code: int) -> None:
    done = run(*cmd)
    assert done.returncode == code
    assert cmd[0].encode() in done.stderr


@pytest.mark.parametrize("machine", ["microvm", "q35"])
def test_machines(machine: str) -> None:
    assert run("echo", "hello", options=("--machine", machine)).stdout == b"hello\n"


@pytest.mark.parametrize("argv", [
    ("run", "./there/is/none", "true"),
    ("run", "--memory", "much", "builtin:busybox"),
    ("run", "--network", "carrier-pigeon", "builtin:busybox"),
    ("run", "--machine", "pdp11", "builtin:busybox"),
])
def test_errors_are_one_line(argv: tuple[str, ...]) -> None:
    done = pykata(*argv)
    assert done.returncode == 125
    lines = [line for line in done.stderr.decode().splitlines() if "warning:" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("pykata: ")
    assert "bug" not in lines[0]


def test_the_demo_image(demo_image: str) -> None:
    script = "import sys, platform; print(6 * 7, sys.stdin.read())"
    done = pykata("run", "--isolation", "emulated", demo_image, "--", "python3", "-c", script, stdin=b"input")
    assert done.stdout == b"42 input\n"


def test_verbose_tells_what_was_started() -> None:
    done = run("true", options=("-v",))
    assert done.returncode == 0
    assert b"qemu-system" in done.stderr
    assert b"Timings(" in done.stderr


def test_check() -> None:
    done = pykata("check")
    assert done.returncode == 0, done.stdout
    assert all(line.startswith(b"ok") for line in done.stdout.splitlines())


def test_guest_info(bundle: object) -> None:
    done = pykata("guest", "info")
    assert done.returncode == 0
    assert Path(done.stdout.split()[1].decode()).is_dir()
