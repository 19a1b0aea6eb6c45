"""A thousand sandboxes, one after the other: nothing of them may stay, however little."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

import pytest

from pykata import Template, host
from tests.vm.conftest import BUSYBOX

CYCLES = int(os.environ.get("PYKATA_TEST_CYCLES", "1000"))
WARM = 50
MOST = 4 * 1024         # KiB by which the program may grow: 4 for each sandbox


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def memory() -> int:
    """KiB of this program's own."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.partition("Private_Dirty:")[2].split()[0])


@pytest.mark.slow
async def test_a_thousand_starts_leave_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Processes, files, mounts and sockets are what each test is checked for."""
    caplog.set_level(logging.INFO, "pykata")    # what the tests record of each machine isn't the program's
    async with Template(BUSYBOX, isolation="emulated") as template:
        for number in range(CYCLES + WARM):
            if number == WARM:
                gc.collect()
                before = descriptors(), memory(), len(list(host.run_root().iterdir()))
            async with template.sandbox() as sb:
                assert (await sb.run(BUSYBOX, ["echo", str(number)])).stdout == f"{number}\n"
        gc.collect()
        assert (descriptors(), len(list(host.run_root().iterdir()))) == (before[0], before[2])
        assert memory() - before[1] < MOST
