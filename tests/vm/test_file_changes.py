"""What a container changed against its image, and what happens in it while one looks."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath

import anyio
import pytest

from pykata import Container, FileError, FileEvent, FileMissingError, Sandbox
from pykata.images.layer import Layer
from pykata.images.layers import write_layers
from pykata.images.limits import DEFAULT_LIMITS

BUSYBOX = "builtin:busybox"
GUARD = 300.0


@pytest.fixture
async def box(sb: Sandbox) -> AsyncIterator[Container]:
    async with sb.container(BUSYBOX) as container:
        yield container


async def out(box: Container, script: str) -> str:
    return (await box.run(["sh", "-c", script], check=True)).stdout


async def changed(box: Container) -> dict[str, str]:
    return {str(change.path): change.kind for change in await box.changes()}


# --- changes ---


async def test_a_fresh_container_has_changed_nothing(box: Container, demo_image: str, sb: Sandbox) -> None:
    assert await box.changes() == []
    async with sb.container(f"oci:{demo_image}") as debian:
        assert await debian.changes() == []
        await debian.run(["true"], check=True)
        assert await debian.changes() == []


async def test_changes(sb: Sandbox, demo_image: str) -> None:
    async with sb.container(f"oci:{demo_image}") as box:
        await out(
            box,
            "echo new > /srv/file; mkdir -p /srv/dir/inner; ln -s file /srv/link; rm /etc/debian_version; echo >> "
            "/etc/passwd; rm -r /etc/skel; chmod 700 /opt; rm -r /usr/lib/os-release /mnt; mkdir /mnt; echo > "
            "/mnt/mine; mkfifo /srv/fifo",
        )
        assert await changed(box) == {
            "/srv/file": "added", "/srv/dir": "added", "/srv/dir/inner": "added", "/srv/link": "added",
            "/srv/fifo": "added", "/etc/debian_version": "deleted", "/etc/passwd": "modified", "/opt": "modified",
            "/etc/skel": "deleted", "/usr/lib/os-release": "deleted", "/mnt/mine": "added",
        }  # fmt: skip
        with pytest.raises(FileError, match="more than 3"):
            await box.changes(limit=3)


async def test_a_directory_that_was_made_anew_hides_the_old_one(sb: Sandbox, demo_image: str) -> None:
    async with sb.container(f"oci:{demo_image}") as box:
        await out(box, "rm -r /etc/apt; mkdir /etc/apt; echo > /etc/apt/mine")
        found = await changed(box)
        assert found.pop("/etc/apt/mine") == "added"
        assert found
        assert set(found.values()) == {"deleted"}
        assert {str(PurePosixPath(path).parent) for path in found} == {"/etc/apt"}


async def test_who_replaces_a_file_modifies_it(box: Container) -> None:
    await box.files.write_text("/etc/passwd", "root:x:0:0::/:/bin/sh\n")
    assert await changed(box) == {"/etc/passwd": "modified"}


async def test_an_exported_layer_makes_the_same_tree(sb: Sandbox, demo_image: str, tmp_path: Path) -> None:
    async with sb.container(f"oci:{demo_image}") as box:
        await out(
            box,
            "echo one > /srv/a; ln /srv/a /srv/b; rm /etc/debian_version; rm -r /etc/apt; mkdir /etc/apt; echo > "
            "/etc/apt/mine; chown 5:6 /srv/a; truncate -s 1G /srv/sparse; touch /srv/é",
        )
        digest = await box.export_changes(tmp_path / "layer.tar")
    layer = (tmp_path / "layer.tar").read_bytes()
    assert digest == f"sha256:{hashlib.sha256(layer).hexdigest()}"
    with tarfile.open(tmp_path / "layer.tar") as tar:
        members = {member.name: member for member in tar}
    assert {"etc/.wh.debian_version", "etc/apt/.wh..wh..opq", "etc/apt/mine", "srv/é"} <= set(members)
    assert not [name for name in members if name.startswith(("proc/", "sys/", "dev/", "etc/host"))]
    assert members["srv/b"].islnk() or members["srv/a"].islnk()
    assert (members["srv/sparse"].size, len(layer) < 100_000) == (1 << 30, True)
    lower = io.BytesIO()
    with tarfile.open(fileobj=lower, mode="w") as tar:
        for name in ("etc/debian_version", "etc/apt/sources.list", "etc/apt/mine", "etc/keep"):
            tar.addfile(tarfile.TarInfo(name))
    merged = io.BytesIO()
    layers = [Layer("lower", lambda: io.BytesIO(lower.getvalue())), Layer("upper", lambda: io.BytesIO(layer), digest)]
    write_layers(layers, DEFAULT_LIMITS, merged)
    merged.seek(0)
    with tarfile.open(fileobj=merged) as tar:
        names = {member.name for member in tar}
    assert {"etc/apt/mine", "etc/keep", "srv/a"} <= names
    assert not names & {"etc/debian_version", "etc/apt/sources.list"}


async def test_an_export_that_fails_leaves_nothing(box: Container, tmp_path: Path) -> None:
    await out(box, "echo x > /f")
    with pytest.raises(FileError, match="max_size"):
        await box.export_changes(tmp_path / "layer", max_size=100)
    with anyio.move_on_after(0):
        await box.export_changes(tmp_path / "layer")
    assert os.listdir(tmp_path) == []


async def test_a_container_cannot_reach_its_layers(box: Container) -> None:
    await box.files.write_text("/secret", "x")
    look = "for n in $(ls /proc/1/fd); do cat /proc/1/fd/$n/secret 2>&1; done | grep -c x || true"
    assert await out(box, look) == "0\n"


# --- watching ---


async def take(events: AsyncIterator[FileEvent], count: int) -> list[tuple[str, str, str | None]]:
    with anyio.fail_after(GUARD):
        found = [await anext(events) for _ in range(count)]
    return [(event.kind, str(event.path), str(event.target) if event.target else None) for event in found]


async def test_watching_a_directory(box: Container) -> None:
    await box.files.mkdir("/w/sub", parents=True)
    async with box.files.watch("/w") as events:
        await out(box, "cd /w; echo x > a; mv a b; chmod 600 b; rm b; echo > sub/unseen; mv sub /gone; rmdir /w")
        assert await take(events, 7) == [
            ("created", "/w/a", None), ("modified", "/w/a", None), ("moved", "/w/a", "/w/b"),
            ("modified", "/w/b", None), ("deleted", "/w/b", None), ("deleted", "/w/sub", None), ("deleted", "/w", None),
        ]  # fmt: skip
        assert [event async for event in events] == []


async def test_watching_a_tree(box: Container) -> None:
    await box.files.mkdir("/w/old/deep", parents=True)
    async with box.files.watch("/w", recursive=True) as events:
        await out(box, "mkdir -p /w/a/b/c; echo > /w/old/deep/f")
        found = set()
        while ("modified", "/w/old/deep/f", None) not in found:
            found |= set(await take(events, 1))
        assert found >= {("created", path, None) for path in ("/w/a", "/w/a/b", "/w/a/b/c", "/w/old/deep/f")}
        await out(box, "mv /w/old /w/new; echo > /w/new/deep/g")
        assert (await take(events, 2)) == [("moved", "/w/old", "/w/new"), ("created", "/w/new/deep/g", None)]


async def test_watching_a_file(box: Container) -> None:
    await box.files.write_text("/f", "x")
    async with box.files.watch("/f") as events:
        await out(box, "echo >> /f")
        assert await take(events, 1) == [("modified", "/f", None)]
    with pytest.raises(FileMissingError, match="/none"):
        async with box.files.watch("/none"):
            pass


@pytest.mark.slow
async def test_lost_events_are_told(box: Container) -> None:
    await box.files.mkdir("/w")
    async with box.files.watch("/w") as events:
        # Nobody reads: windows, queues and the pipe fill up, then the kernel's queue. Equal events in a row are one.
        await out(box, "cd /w; i=0; while [ $i -lt 35000 ]; do i=$((i+1)); echo > a; echo > b; done")
        kinds = set()
        with anyio.fail_after(GUARD):
            async for event in events:
                kinds.add(event.kind)
                if event.kind == "overflow":
                    break
        assert kinds == {"created", "modified", "overflow"}
