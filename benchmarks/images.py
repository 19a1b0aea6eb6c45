"""Pulling and converting an image from a registry on loopback, beside what gets as far without pykata.

The image is the demo image, Debian with Python, its layers compressed with gzip as most are. Cold: nothing of it is
here; from the name to the filesystem image that a sandbox attaches. The floor is ``skopeo copy`` from the same
registry to an OCI layout followed by ``umoci unpack``, measured in turns with it. Warm: from the name to its config and
disk, for an image that is here; no registry is asked. Memory: of the whole program that pulls; and of one that merges a
layer with three times as many files as its floor has.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import zstandard

import pykata
from benchmarks._table import Row, interleaved, main, note, row
from pykata.images import resolve
from pykata.images.limits import DEFAULT_LIMITS
from tests.real_registry import push, registry

ROOT = Path(__file__).resolve().parents[1]
DEMO_IMAGE = ROOT / "images" / "debian-python"
WARM = 50
FEW, MANY = 100_000, 300_000            # files
MEMORY = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
PULL = f"import asyncio, sys, pykata; asyncio.run(pykata.pull_image(sys.argv[1])); {MEMORY}"


def gzipped(source: Path, layout: Path) -> tuple[int, int]:
    """Copy an OCI layout with zstd layers as one with gzip layers; returns their sizes, compressed and not."""
    (layout / "blobs" / "sha256").mkdir(parents=True)
    index = json.loads((source / "index.json").read_bytes())
    manifest = json.loads(_blob(source, index["manifests"][0]).read_bytes())
    plain = 0
    for layer in manifest["layers"]:
        with _blob(source, layer).open("rb") as packed:
            size, tar = _recompressed(packed, layout / "part")
        digest = hashlib.sha256((layout / "part").read_bytes()).hexdigest()
        (layout / "part").rename(layout / "blobs" / "sha256" / digest)
        layer.update(mediaType="application/vnd.oci.image.layer.v1.tar+gzip", digest=f"sha256:{digest}", size=size)
        plain += tar
    shutil.copy(_blob(source, manifest["config"]), layout / "blobs" / "sha256")
    raw = json.dumps(manifest).encode()
    digest = hashlib.sha256(raw).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(raw)
    index["manifests"][0].update(digest=f"sha256:{digest}", size=len(raw))
    (layout / "index.json").write_text(json.dumps(index))
    shutil.copy(source / "oci-layout", layout)
    return sum(layer["size"] for layer in manifest["layers"]), plain


def _recompressed(packed: Any, part: Path) -> tuple[int, int]:
    deflate, plain = zlib.compressobj(6, wbits=31), 0
    with zstandard.ZstdDecompressor().stream_reader(packed) as reader, part.open("wb") as out:
        while chunk := reader.read(1 << 20):
            plain += len(chunk)
            out.write(deflate.compress(chunk))
        out.write(deflate.flush())
    return part.stat().st_size, plain


def _blob(layout: Path, descriptor: dict[str, str]) -> Path:
    return layout / "blobs" / descriptor["digest"].replace(":", "/")


@contextmanager
def empty(folder: Path) -> Iterator[Path]:
    """A directory that isn't there before and after."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def ours(name: str, folder: Path, memory: list[float]) -> float:
    """Milliseconds of a pull into an empty cache, in a program of its own."""
    with empty(folder / "cache") as cache:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", PULL, name], env={**os.environ, "PYKATA_CACHE": str(cache)},
                              check=True, stdout=subprocess.PIPE)
        elapsed = (time.perf_counter() - began) * 1000
        memory.append(int(done.stdout) / 1024)
    return elapsed


def theirs(name: str, folder: Path) -> float:
    """Milliseconds of ``skopeo copy`` and ``umoci unpack``."""
    with empty(folder / "theirs") as work:
        layout, rootless = work / "layout", [] if os.geteuid() == 0 else ["--rootless"]
        began = time.perf_counter()
        for command in (
            ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", f"docker://{name}",
             f"oci:{layout}:latest"],
            ["umoci", "unpack", *rootless, "--image", f"{layout}:latest", str(work / "bundle")],
        ):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return (time.perf_counter() - began) * 1000


async def warm(name: str) -> list[float]:
    """Milliseconds to resolve an image that is here."""
    await pykata.pull_image(name)
    values = []
    for _ in range(WARM):
        began = time.perf_counter()
        await resolve(name, architecture=os.uname().machine)
        values.append((time.perf_counter() - began) * 1000)
    return values


def many_files() -> list[float]:
    """Megabytes that merging a layer takes, of few files and then of many."""
    argv = [sys.executable, "-m", "tests.large_layer", str(DEFAULT_LIMITS.memory), str(FEW), str(MANY)]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    return [int(line) / 1e6 for line in done.stdout.split()]


async def measure(rounds: int) -> list[Row]:
    """A row for a cold store, one for memory, one for a warm store."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        folder, memory = Path(place), list[float]()
        stored, plain = gzipped(DEMO_IMAGE, folder / "layout")
        with registry(folder / "registry") as host:
            name = f"{host}/debian-python:1"
            push(f"{folder / 'layout'}:latest", host, "debian-python:1")

            async def pull() -> float:
                return await anyio.to_thread.run_sync(ours, name, folder, memory)

            async def floor() -> float:
                return await anyio.to_thread.run_sync(theirs, name, folder)

            await interleaved(1, floor, pull)
            without, cold = await interleaved(rounds, floor, pull)
            os.environ["PYKATA_CACHE"] = str(folder / "warm")
            resolved = await warm(name)
        few, many = await anyio.to_thread.run_sync(many_files)
    note(f"the image: {plain / 1e6:.0f} MB in tars, {stored / 1e6:.0f} MB as gzip; the floor: skopeo and umoci")
    return [
        row("pull and convert, cold, program start included", "ms", cold, without),
        row("  peak memory of that program", "MB", memory[1:]),
        row("resolve, warm", "ms", resolved),
        row(f"peak memory of merging {MANY} files ({FEW})", "MB", [many], [few]),
    ]


if __name__ == "__main__":
    main(measure, rounds=7, about=__doc__)
