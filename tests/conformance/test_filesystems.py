"""What works on each filesystem that a container can have: docs/reference/filesystems.md has the table of it.

``UPDATE_TABLE=1`` writes what is found into that page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec

from pykata import Bind, DiskImage, FsspecVolume, Sandbox, Tmpfs

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "filesystems.md"
PROGRAM = Path(__file__).with_name("operations.py")
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

ROOTS = {"root filesystem": "block", "`fs=\"virtiofs\"`": "virtiofs", "`fs=\"9p\"`": "9p"}
VOLUMES = {
    "`Bind` by virtio-fs": "/v", "the same, `cache=\"none\"`": "/n", "`Bind` by 9p": "/p", "`DiskImage`": "/d",
    "`FsspecVolume`": "/f", "`Tmpfs`": "/t",
}  # fmt: skip
PLACE = "/srv"          # in the root filesystem
Results = dict[str, dict[str, str]]


async def test_the_table_says_what_works(tmp_path: Path, demo_image: str) -> None:
    image = f"oci:{demo_image}"
    for name in "vnp":
        (tmp_path / name).mkdir()
    files = fsspec.filesystem("memory")
    files.makedirs("/conformance")
    volumes: dict[str, Any] = {
        "/v": Bind(tmp_path / "v", via="virtiofs"), "/n": Bind(tmp_path / "n", via="virtiofs", cache="none"),
        "/p": Bind(tmp_path / "p", via="9p"), "/t": Tmpfs("64M"), "/d": DiskImage(tmp_path / "d", size="128M"),
        "/f": FsspecVolume(files, "/conformance"),
    }  # fmt: skip
    found: dict[str, Results] = {}
    for title, fs in ROOTS.items():
        inside = volumes if fs == "block" else {}
        places = [PLACE, *VOLUMES.values()] if fs == "block" else [PLACE]
        found[title] = await tried(image, fs, inside, places)
    files.rm("/conformance", recursive=True)
    columns = {title: {name: each[PLACE] for name, each in found[title].items()} for title in ROOTS}
    mixed = found["root filesystem"]
    columns |= {title: {name: each[place] for name, each in mixed.items()} for title, place in VOLUMES.items()}
    before, _, rest = PAGE.read_text().partition(BEGIN)
    said, _, after = rest.partition(END)
    now = table(columns)
    if os.environ.get("UPDATE_TABLE"):
        PAGE.write_text(before + BEGIN + now + END + after)
    assert said == now or os.environ.get("UPDATE_TABLE")
    for results in columns.values():
        assert results["device nodes that open (must not)"] != "yes"


async def tried(image: str, fs: str, volumes: Mapping[str, Any], places: Sequence[str]) -> Results:
    """What works in each of these places, by the name of the operation."""
    program = {"/mnt/program.py": Bind(PROGRAM, readonly=True)}
    options: dict[str, Any] = {"fs": fs, "volumes": {**volumes, **program}, "memory": "512M", "template": "off"}
    async with Sandbox(isolation="emulated", **options) as sb:
        done = await sb.run(image, ["python3", "/mnt/program.py", *places], timeout=900)
    assert done.exit_code == 0, done.stderr
    results: Results = json.loads(done.stdout)
    return results


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """The page's table, with a line for each operation."""
    names = next(iter(columns.values()))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(each[name] for each in columns.values())] for name in names]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
