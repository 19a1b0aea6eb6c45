"""``-it``: the command has a terminal, ours is raw meanwhile, and is what it was however it ends."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attrs import define

RUN = [sys.executable, "-m", "pykata_cli", "run", "--isolation", "emulated", "-it", "builtin:busybox", "--"]
PATIENCE = 600.0


@define
class Screen:
    """A terminal, and what was written to it."""

    master: int
    slave: int
    seen: bytes = b""

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def until(self, text: bytes) -> bytes:
        """Wait until this is on the screen; returns all that was written."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert select.select([self.master], [], [], deadline - time.monotonic())[0], self.seen
            self.seen += os.read(self.master, 65536)
        return self.seen

    @property
    def settings(self) -> list[object]:
        return termios.tcgetattr(self.slave)


@pytest.fixture
def screen() -> Iterator[Screen]:
    master, slave = pty.openpty()
    terminal = Screen(master, slave)
    terminal.resize(33, 111)
    yield terminal
    os.close(master)
    os.close(slave)


@contextmanager
def start(screen: Screen, *cmd: str, argv: list[str] = RUN) -> Iterator[subprocess.Popen[bytes]]:
    """A command of pykata on this terminal; a test that fails doesn't wait for it."""
    with subprocess.Popen([*argv, *cmd], stdin=screen.slave, stdout=screen.slave, stderr=screen.slave) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def vmm_of(pid: int) -> int:
    """The QEMU of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(child) for child in children if b"qemu" in Path(f"/proc/{child}/cmdline").read_bytes())


def test_a_shell(screen: Screen) -> None:
    before = screen.settings
    with start(screen, "sh") as process:
        screen.until(b"# ")
        assert screen.settings != before
        screen.type(b"stty size; tty\r")
        screen.until(b"33 111")
        screen.until(b"/dev/")
        screen.resize(44, 122)
        process.send_signal(signal.SIGWINCH)
        screen.type(b"while ! stty size | grep 44; do :; done\r")
        screen.until(b"44 122")
        screen.type(b"sh -c 'echo as''leep; exec sleep 1000'\r")    # what it says isn't what is typed
        screen.until(b"asleep")
        screen.type(b"\x03")                            # it is the guest's sleep that this ends
        screen.type(b"echo still $((40 + 2))\r")
        screen.until(b"still 42")
        screen.type(b"exit 7\r")
        assert process.wait() == 7
    assert screen.settings == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_outside(screen: Screen, number: signal.Signals) -> None:
    before = screen.settings
    with start(screen, "sh", "-c", "echo ready; sleep 1000") as process:
        screen.until(b"ready")
        process.send_signal(number)
        assert process.wait() == 128 + number
    assert screen.settings == before


def test_a_machine_that_dies(screen: Screen) -> None:
    before = screen.settings
    with start(screen, "sh", "-c", "echo ready; sleep 1000") as process:
        screen.until(b"ready")
        os.kill(vmm_of(process.pid), signal.SIGKILL)
        assert process.wait() == 125
    screen.until(b"pykata: QEMU was killed by SIGKILL")
    assert screen.settings == before


def test_a_timeout(screen: Screen) -> None:
    before = screen.settings
    options = [*RUN[:-3], "--timeout", "1", *RUN[-3:]]
    with start(screen, "sh", "-c", "echo ready; sleep 1000", argv=options) as process:
        assert process.wait() == 124
    screen.until(b"its 1 s were over\r\n")
    assert screen.settings == before


def test_impatience_while_it_boots(screen: Screen) -> None:
    before = screen.settings
    with start(screen, "sh", argv=[*RUN[:4], "-v", *RUN[4:]]) as process:
        screen.until(b"spawn: ")
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            if select.select([screen.master], [], [], 0.1)[0]:      # what it tells must be read
                os.read(screen.master, 65536)
        assert process.returncode == 128 + signal.SIGINT
    assert screen.settings == before


def test_a_terminal_that_goes_away() -> None:
    master, slave = pty.openpty()
    with start(Screen(master, slave), "sh", "-c", "echo ready; sleep 1000") as process:
        Screen(master, slave).until(b"ready")
        os.close(slave)
        os.close(master)
        process.send_signal(signal.SIGHUP)          # as the kernel does, had it a session of its own
        assert process.wait() in (128 + signal.SIGHUP, 128 + signal.SIGPIPE)


def test_exec_in_a_detached_one(screen: Screen) -> None:
    pykata = [sys.executable, "-m", "pykata_cli"]
    before = screen.settings
    subprocess.run([*pykata, "run", "--isolation", "emulated", "-d", "--name", "box", "builtin:busybox"], check=True)
    try:
        with start(screen, "sh", argv=[*pykata, "exec", "-it", "box", "--"]) as process:
            screen.until(b"# ")
            screen.type(b"stty size\r")
            screen.until(b"33 111")
            subprocess.run([*pykata, "stop", "-t", "0", "box"], check=True)
            assert process.wait() == 125
        screen.until(b"'box' has ended: it was stopped")
        assert screen.settings == before
    finally:
        subprocess.run([*pykata, "stop", "-t", "0", "box"], check=False)


def test_a_terminal_without_input(screen: Screen) -> None:
    before = screen.settings
    argv = [word if word != "-it" else "-t" for word in RUN]
    with start(screen, "sh", "-c", "test -t 1 && echo terminal; read line", argv=argv) as process:
        screen.until(b"terminal")
        assert screen.settings == before, "it is not read, so it stays as it is"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 128 + signal.SIGINT
    assert screen.settings == before
