"""The cpio archive, as the kernel and cpio(1) read it."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

from pykata.guest.cpio import character_device, directory, newc, program
from pykata.guest.initrd import write_initrd


def test_every_header_is_aligned_and_counts_its_bytes() -> None:
    archive = newc([directory("dev"), program("init", b"12345")])
    assert archive[:6] == b"070701"
    assert len(archive) % 512 == 0
    offset = archive.index(b"070701", 6)
    assert offset % 4 == 0
    fields = [int(archive[offset + 6 + 8 * i : offset + 14 + 8 * i], 16) for i in range(13)]
    assert fields[1] == stat.S_IFREG | 0o755
    assert fields[6] == 5
    assert fields[11] == len("init") + 1


def test_device_numbers_are_in_the_rdev_fields() -> None:
    record = newc([character_device("dev/console", 5, 1)])
    assert [int(record[6 + 8 * i : 14 + 8 * i], 16) for i in (9, 10)] == [5, 1]


def test_cpio_lists_the_initrd(tmp_path: Path) -> None:
    agent, initrd = tmp_path / "agent", tmp_path / "initrd.cpio"
    agent.write_bytes(b"\x7fELF and more")
    write_initrd(agent, initrd)
    listed = subprocess.run(
        ["cpio", "--list", "--quiet", "--file", initrd], check=True, capture_output=True, text=True
    )
    assert listed.stdout.split() == ["dev", "dev/console", "init", "proc", "run", "sys", "tmp"]


def test_the_initrd_depends_on_the_agent_alone(tmp_path: Path) -> None:
    agent = tmp_path / "agent"
    agent.write_bytes(b"agent")
    write_initrd(agent, tmp_path / "one")
    agent.touch()
    write_initrd(agent, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
