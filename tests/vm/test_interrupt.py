"""Ctrl-C of ``pykata run``, at many moments: each time it ends, and nothing is left, which each test's fixture sees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pykata.guest import Bundle

RUN = [sys.executable, "-m", "pykata_cli", "run", "--isolation", "emulated", "builtin:busybox", "--"]

# Fractions of what a whole run takes: while Python starts, QEMU is spawned, the guest boots, the command runs, and the
# sandbox is left.
MOMENTS = [number / 12 for number in range(1, 14)]


@pytest.fixture(scope="module")
def whole(bundle: Bundle) -> float:
    """Seconds that a run takes on this machine."""
    began = time.monotonic()
    subprocess.run([*RUN, "true"], check=True, env={**os.environ, "PYKATA_BUNDLE": str(bundle.path)})
    return time.monotonic() - began


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment:.2f}")
def test_ctrl_c_leaves_nothing(whole: float, moment: float) -> None:
    with subprocess.Popen([*RUN, "true"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        timer = threading.Timer(whole * moment, process.send_signal, [signal.SIGINT])
        timer.start()
        _, said = process.communicate()
        timer.join()
    # It was too late, or Python had not come as far as to say how it ends, or wasn't even Python yet.
    early = {1} if said.startswith(b"Fatal Python error: init_") else set[int]()
    assert process.returncode in {0, 128 + signal.SIGINT, -signal.SIGINT, *early}, said
    assert b"this is a bug" not in said


def test_ctrl_c_twice_leaves_nothing(whole: float) -> None:
    with subprocess.Popen([*RUN, "sleep", "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for moment in (0.7, 0.05, 0.05):
            time.sleep(whole * moment)
            process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode != 0
