"""Images of a real Docker and of a real Podman: their own daemons, with storage of their own. No container is run."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, cast

import anyio.to_thread
import pytest

from pykata import ImageNotFoundError, list_images, load_image
from pykata.images import resolve
from pykata.images.config import chain_id
from tests.images_fixtures import digest_of, file, layout_of, symlink, tar_of, whiteout

pytestmark = [
    pytest.mark.usefixtures("places"),
    pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can run these daemons"),
]

BASE = tar_of([file("etc/a", b"a" * 50_000), file("etc/b", b"b")])
TOP = tar_of([whiteout("etc/a"), file("etc/c", b"c", mode=0o4755, uid=5, gid=6), symlink("etc/d", "c")])
NAMES = {"etc", "etc/b", "etc/c", "etc/d"}


def run(*argv: str | Path) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{argv}: {done.stderr}"


@contextmanager
def daemon(path: Path, argv: Sequence[str | Path]) -> Iterator[None]:
    """Run one that takes its listening socket over (sd_listen_fds(3)): who connects before it is ready just waits."""
    with socket.socket(socket.AF_UNIX) as listening, (path.parent / "log").open("wb") as log:
        listening.bind(str(path))
        listening.listen()
        # The socket must be descriptor 3, and the pid the daemon's own.
        script = f"LISTEN_PID=$$; export LISTEN_PID; exec 3<&{listening.fileno()}; exec \"$@\""
        process = subprocess.Popen(
            ["/bin/bash", "-c", script, "daemon", *argv], pass_fds=[listening.fileno()], stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, env={**os.environ, "LISTEN_FDS": "1"},
        )  # fmt: skip
        try:
            yield
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short path, for the sockets below it."""
    path = Path(tempfile.mkdtemp(prefix="pk-", dir="/tmp"))
    layout_of(path / "l", [BASE, TOP])
    run("skopeo", "--insecure-policy", "copy", "--quiet", f"oci:{path}/l:latest", f"docker-archive:{path}/a.tar:app:1")
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def docker(place: Path) -> Iterator[Path]:
    folder = place / "docker"
    folder.mkdir()
    argv: list[str | Path] = [
        "dockerd", "--host", "fd://", "--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile",
        folder / "pid", "--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-forward=false",
        "--ip-masq=false", "--storage-driver", "vfs",
    ]  # fmt: skip
    with daemon(folder / "s", argv):
        run("docker", "--host", f"unix://{folder}/s", "load", "--quiet", "--input", place / "a.tar")
        yield folder / "s"


@contextmanager
def podman(place: Path) -> Iterator[Path]:
    folder = place / "podman"
    folder.mkdir()
    argv: list[str | Path] = [
        "podman", "--root", folder / "root", "--runroot", folder / "run", "--tmpdir", folder / "tmp",
        "--storage-driver", "vfs", "--events-backend", "file", "--cgroup-manager", "cgroupfs",
    ]  # fmt: skip
    run(*argv, "load", "--quiet", "--input", place / "a.tar")
    with daemon(folder / "s", [*argv, "system", "service", "--time", "0"]):
        yield folder / "s"


@pytest.fixture(scope="module", params=[docker, podman], ids=["docker", "podman"])
def listening(request: pytest.FixtureRequest, place: Path) -> Iterator[Path]:
    with request.param(place) as path:
        yield path


@pytest.fixture
def engine(listening: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an engine that ``$DOCKER_HOST`` leads to."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{listening}")
    return listening.parent.name


async def members(reference: str) -> dict[str, tarfile.TarInfo]:
    image = await resolve(reference, architecture="x86_64")
    assert image.digest == chain_id([digest_of(BASE), digest_of(TOP)])
    assert (image.config.cmd, image.config.env) == (("/bin/sh",), {"PATH": "/bin"})
    assert image.write_tar is not None
    out = io.BytesIO()
    await anyio.to_thread.run_sync(partial(image.write_tar, cast(IO[bytes], out)))
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        return {info.name: info for info in tar if info.name != "."}


@pytest.mark.parametrize("name", ["app:1", "docker.io/library/app:1"])
async def test_an_image_of_an_engine(engine: str, name: str) -> None:
    found = await members(f"docker-daemon:{name}")
    assert set(found) == NAMES
    top = found["etc/c"]
    assert (top.mode, top.uid, top.gid, found["etc/d"].linkname) == (0o4755, 5, 6, "c")


async def test_an_image_that_the_engine_does_not_have(engine: str) -> None:
    with pytest.raises(ImageNotFoundError, match=r"has no image 'none:1'"):
        await resolve("docker-daemon:none:1", architecture="x86_64")


async def test_an_image_of_an_engine_is_loaded(engine: str) -> None:
    await load_image("docker-daemon:app:1", f"{engine}:1")
    [listed] = await list_images()
    assert listed.name == f"docker.io/library/{engine}:1"
    image = await resolve(f"{engine}:1", architecture="x86_64")
    assert image.config.env["PATH"] == "/bin"
