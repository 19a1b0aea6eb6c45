"""Output whose pages are the writer's, a file's, or of other pipes as well: nothing of it is lost or changed."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Literal

import pytest

from pykata import QEMU, Container, Sandbox

BUSYBOX = "builtin:busybox"
WRITER = Path(__file__).with_name("pipes.c")
PERIOD = bytes(range(251))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A program that writes in every way there is."""
    binary = tmp_path_factory.mktemp("pipes") / "pipes"
    subprocess.run(["gcc", "-static", "-O2", "-s", "-o", binary, WRITER], check=True)
    return binary.read_bytes()


def expected(size: int) -> bytes:
    return (PERIOD * (size // len(PERIOD) + 1))[:size]


async def prepared(container: Container, writer: bytes) -> None:
    await container.files.write_bytes("/tmp/pipes", writer)
    await container.files.chmod("/tmp/pipes", 0o755)


async def streamed(container: Container) -> None:
    async with container.process(["/tmp/pipes"]) as process:
        digest, size = hashlib.sha256(), 0
        async for piece in process.stdout:
            digest.update(piece)
            size += len(piece)
        said = await process.stderr.read()
        assert await process.wait() == 0, said
    assert size == int(said) > 32 * 1024 * 1024
    assert digest.digest() == hashlib.sha256(expected(size)).digest()


@pytest.mark.parametrize("machine", ["microvm", "q35"])
async def test_every_way_to_write(machine: Literal["microvm", "q35"], writer: bytes) -> None:
    async with (
        Sandbox(QEMU(machine=machine), isolation="emulated", template="off") as sb,
        sb.container(BUSYBOX) as container,
    ):
        await prepared(container, writer)
        await streamed(container)
        done = await container.run(["/tmp/pipes"], max_output=1 << 28, check=True)
        assert done.stdout_bytes == expected(int(done.stderr))
        # By a pipe that isn't the agent's, and is read in small pieces.
        done = await container.run(["sh", "-c", "/tmp/pipes 2>/tmp/size | dd bs=1000 2>/dev/null | md5sum"], check=True)
        size = int(await container.files.read_text("/tmp/size"))
        assert done.stdout.split()[0] == hashlib.md5(expected(size), usedforsecurity=False).hexdigest()
