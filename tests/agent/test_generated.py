"""The checked-in messages are what agent.proto says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/generate_proto.py"


@pytest.mark.skipif(shutil.which("protoc") is None, reason="protoc isn't installed")
def test_generated_code_is_current() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
