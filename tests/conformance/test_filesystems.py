"""What works on each filesystem that a container can have: docs/reference/filesystems.md has the table of it.

``UPDATE_TABLE=1`` writes what is found into that page.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pykata import Bind, DiskImage, Sandbox, Tmpfs

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "filesystems.md"
PROGRAM = Path(__file__).with_name("operations.py")
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

COLUMNS = {
    "root filesystem": "/srv", "`Bind` by virtio-fs": "/v", "the same, `cache=\"none\"`": "/n", "`Bind` by 9p": "/p",
    "`DiskImage`": "/d", "`Tmpfs`": "/t",
}  # fmt: skip


async def test_the_table_says_what_works(tmp_path: Path, demo_image: str) -> None:
    for name in "vnp":
        (tmp_path / name).mkdir()
    volumes: dict[str, Any] = {
        "/v": Bind(tmp_path / "v", via="virtiofs"), "/n": Bind(tmp_path / "n", via="virtiofs", cache="none"),
        "/p": Bind(tmp_path / "p", via="9p"), "/t": Tmpfs("64M"), "/d": DiskImage(tmp_path / "d", size="128M"),
        "/mnt/program.py": Bind(PROGRAM, readonly=True),
    }  # fmt: skip
    async with Sandbox(isolation="emulated", volumes=volumes, memory="512M") as sb:
        command = ["python3", "/mnt/program.py", *COLUMNS.values()]
        done = await sb.run(f"oci:{demo_image}", command, timeout=300)
    assert done.exit_code == 0, done.stderr
    results = json.loads(done.stdout)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    said, _, after = rest.partition(END)
    found = table(results)
    if os.environ.get("UPDATE_TABLE"):
        PAGE.write_text(before + BEGIN + found + END + after)
    assert said == found or os.environ.get("UPDATE_TABLE")
    for place in COLUMNS.values():
        assert results["device nodes that open (must not)"][place] != "yes"


def table(results: dict[str, dict[str, str]]) -> str:
    lines = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    lines += [[name, *(each[place] for place in COLUMNS.values())] for name, each in results.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
