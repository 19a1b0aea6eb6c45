"""What scripts do before they do anything else: nothing here gets as far as the network."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conftest import ROOT


def fetch_qemu(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", ROOT / "scripts/fetch-qemu", directory], capture_output=True, text=True, check=False,
    )


def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("still there")
    done = fetch_qemu(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{tmp_path} is there already, and isn't an empty directory" in done.stderr
    (tmp_path / "mine").rename(tmp_path / "qemu-system-x86_64")
    (tmp_path / "qemu-system-x86_64").chmod(0o755)
    assert fetch_qemu(tmp_path).returncode == 0         # one is there
    assert (tmp_path / "qemu-system-x86_64").read_text() == "still there"
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))
