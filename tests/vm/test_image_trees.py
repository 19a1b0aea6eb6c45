"""Real images, pulled from a registry: the tree inside the guest is that of ``umoci unpack``, file by file."""

from __future__ import annotations

import os
import random
import runpy
import shutil
import stat
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anyio.to_thread
import pytest

from benchmarks.images import gzipped
from pykata import Sandbox
from tests.host.test_images_umoci import live
from tests.images_fixtures import CAPABILITY
from tests.real_registry import push, registry

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can unpack owners and device nodes"),
]

IMAGES = ("debian-python", "debian-python-changed", "debian-essential", "debian-essential-changed", "busybox")
MAKER = Path(__file__).parents[2] / "scripts" / "make_demo_image.py"
WALKER = Path(__file__).with_name("walker.c")


def run(*argv: str | Path) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stderr}"


def apt_sources() -> tuple[str, list[str]]:
    """What the demo image's packages come from."""
    found: tuple[str, list[str]] = runpy.run_path(str(MAKER))["apt_sources"]()
    return found


def repacked(layout: Path, root: Path | None, seeds: range) -> None:
    """Give the image in ``layout`` a layer from ``root``, and one for each of ``seeds`` of arbitrary changes."""
    bundle = layout.parent / "repacking"
    for seed in (None, *seeds):
        if seed is None and root is None:
            continue
        run("umoci", "unpack", "--image", f"{layout}:latest", bundle)
        if seed is None and root is not None:
            run("cp", "-a", f"{root}/.", bundle / "rootfs")
        elif seed is not None:
            live(bundle / "rootfs", random.Random(seed))
        run("umoci", "repack", "--image", f"{layout}:latest", bundle)
        shutil.rmtree(bundle)


def new(layout: Path) -> Path:
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:latest")
    return layout


def busybox(root: Path) -> Path:
    """Busybox with all its applets, and what images have seldom."""
    program = shutil.which("busybox")
    assert program is not None
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()      # every container has one, for its own hosts and resolv.conf
    shutil.copy(program, root / "bin/busybox")
    for applet in subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout.split():
        if applet != "busybox":
            os.link(root / "bin/busybox", root / "bin" / applet)
    (root / "bin/busybox").chmod(0o4755)
    shutil.copy(program, root / "ping")
    os.setxattr(root / "ping", "security.capability", CAPABILITY)
    os.mknod(root / "node", stat.S_IFBLK | 0o640, os.makedev(7, 300))
    os.mkfifo(root / "fifo")
    (root / os.fsdecode(b"not-utf8-\xff")).write_bytes(b"x")
    os.chown(root / os.fsdecode(b"not-utf8-\xff"), 70_000, 4_000_000_000)
    return root


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, demo_image: str) -> dict[str, Path]:
    """The images as OCI layouts, each with the walker on top."""
    place = tmp_path_factory.mktemp("images")
    found = {name: place / name for name in IMAGES}
    gzipped(Path(demo_image), found["debian-python"])
    shutil.copytree(found["debian-python"], found["debian-python-changed"])
    repacked(found["debian-python-changed"], None, range(4))
    essential = place / "essential"
    codename, sources = apt_sources()
    run("mmdebstrap", "--variant=essential", "--mode=root", "--skip=output/dev", "--format=directory",
        codename, essential, *sources)
    repacked(new(found["debian-essential"]), essential, range(0))
    shutil.copytree(found["debian-essential"], found["debian-essential-changed"])
    repacked(found["debian-essential-changed"], None, range(10, 13))
    repacked(new(found["busybox"]), busybox(place / "busybox-root"), range(0))
    run("gcc", "-static", "-O2", "-o", place / "walker", WALKER)
    for layout in found.values():
        run("umoci", "insert", "--image", f"{layout}:latest", place / "walker", "/walker")
    return found


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, layouts: dict[str, Path]) -> Iterator[str]:
    with registry(tmp_path_factory.mktemp("registry")) as host:
        for name, layout in layouts.items():
            push(f"{layout}:latest", host, f"{name}:1")
        yield host


def unpacked(layout: Path, bundle: Path) -> list[str]:
    run("umoci", "unpack", "--image", f"{layout}:latest", bundle)
    root = bundle / "rootfs"
    try:
        walked = subprocess.run([root / "walker", root], check=True, capture_output=True, text=True)
        return walked.stdout.splitlines()
    finally:
        shutil.rmtree(bundle)


@pytest.mark.parametrize("name", IMAGES)
async def test_the_tree_in_the_guest_is_that_of_umoci(
    sb: Sandbox, layouts: dict[str, Path], host: str, tmp_path: Path, name: str
) -> None:
    expected = await anyio.to_thread.run_sync(partial(unpacked, layouts[name], tmp_path / "bundle"))
    done = await sb.run(f"{host}/{name}:1", ["/walker"], user="0", max_output=64 * 1024 * 1024)
    assert done.exit_code == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line]
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    assert (missing, extra) == ([], [])
    assert len(found) > 100
