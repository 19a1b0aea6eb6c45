"""A thousand sandboxes, one after the other: nothing of them may stay, however little."""

from __future__ import annotations

import json
import os
import sys

import anyio
import pytest

from tests.vm.conftest import BUSYBOX

CYCLES = int(os.environ.get("PYKATA_TEST_CYCLES", "1000"))
MOST = 4096             # bytes by which the program may grow for each sandbox

# A program of its own: what a test run keeps of its tests isn't pykata's.
PROGRAM = """
import gc, json, os, sys
from pathlib import Path
import anyio
from pykata import Template, host

IMAGE, CYCLES, WARM = sys.argv[1], int(sys.argv[2]), 100

def now():
    gc.collect()
    own = Path("/proc/self/smaps_rollup").read_text().partition("Private_Dirty:")[2].split()[0]
    return {"descriptors": len(os.listdir("/proc/self/fd")), "memory": int(own) * 1024,
            "directories": len(list(host.run_root().iterdir())), "objects": len(gc.get_objects())}

async def main():
    async with Template(IMAGE, isolation="emulated", spares=0) as template:
        for number in range(CYCLES + WARM):
            if number in (WARM // 2, WARM):     # to look takes memory as well, the first time
                before = now()
            async with template.sandbox() as sb:
                assert (await sb.run(IMAGE, ["echo", str(number)])).stdout == f"{number}\\n"
        print(json.dumps([before, now()]))

anyio.run(main)
"""


@pytest.mark.slow
async def test_a_thousand_starts_leave_nothing() -> None:
    """Processes, files, mounts and sockets are what each test is checked for."""
    done = await anyio.run_process([sys.executable, "-c", PROGRAM, BUSYBOX, str(CYCLES)], stderr=None)
    before, after = json.loads(done.stdout)
    assert (after["descriptors"], after["directories"]) == (before["descriptors"], before["directories"])
    assert after["objects"] - before["objects"] < CYCLES        # less than one for each
    assert after["memory"] - before["memory"] < CYCLES * MOST
