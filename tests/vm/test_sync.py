"""The synchronous face over real machines: a plain script, and Ctrl-C in the middle of it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

import pykata.sync

BUSYBOX = "builtin:busybox"

SCRIPT = """
import pykata.sync
WAIT = ["sh", "-c", "echo ready; sleep 1000"]
with pykata.sync.Sandbox(isolation="emulated") as sb:
    try:
        sb.run("builtin:busybox", WAIT, on_stdout=lambda piece: print("ready", flush=True))
    except KeyboardInterrupt:
        print(sb.run("builtin:busybox", ["echo", "still of use"]).stdout, end="", flush=True)
    sb.run("builtin:busybox", WAIT, on_stdout=lambda piece: print("ready", flush=True))
"""


def test_a_sandbox() -> None:
    with pykata.sync.Sandbox(isolation="emulated") as sb, sb.container(BUSYBOX) as container:
        assert container.run(["sh", "-c", "echo kept > /file"]).ok
        with container.process(["cat", "/file", "-"]) as process:
            process.stdin.send(b"sent")
            process.stdin.aclose()
            assert b"".join(process.stdout) == b"kept\nsent"
            assert process.wait() == 0
        assert container.run(["sleep", "1000"], timeout=0.5).reason == "timeout"


def test_ctrl_c_in_a_script() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == b"ready\n"
        script.send_signal(signal.SIGINT)
        assert script.stdout.readline() == b"still of use\n"
        assert script.stdout.readline() == b"ready\n"
        script.send_signal(signal.SIGINT)
        _, said = script.communicate()
        assert said.rstrip().endswith(b"KeyboardInterrupt")
        assert script.returncode in (1, -signal.SIGINT, 128 + signal.SIGINT)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_script_that_is_killed_takes_its_machine_with_it(ending: signal.Signals) -> None:
    # nothing_left looks for what runs; the directory of a dead program is left for a gc.
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == b"ready\n"
        script.send_signal(ending)
        assert script.wait() == -ending
    assert len(pykata.sync.collect_garbage()) == 1
