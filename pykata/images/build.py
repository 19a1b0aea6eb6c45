"""Makes the image of a recipe: a layer for what it begins with, one for its files, both compressed with zstd."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import IO, Any, cast

import anyio.to_thread
import zstandard
from attrs import frozen

from pykata import host
from pykata.errors import ConfigError, ImageError
from pykata.images.config import Platform, go_architecture
from pykata.images.depot import Depot, Record, explained
from pykata.images.entry import Entry, Kind
from pykata.images.layers import Output
from pykata.images.manifest import MANIFESTS, Descriptor
from pykata.images.name import Name
from pykata.images.recipe import PATH, Recipe
from pykata.images.stream import CHUNK
from pykata.images.tar_writer import END, header, padding
from pykata.spec import Image, ImageConfig

LABEL = "io.pykata.recipe"
LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"
CONFIG = "application/vnd.oci.image.config.v1+json"
LEVEL = 3
DEBIAN = {"amd64": "amd64", "arm64": "arm64"}       # Go's names of architectures, and Debian's

WriteTar = Callable[[IO[bytes]], None]


@frozen
class Built:
    """A layer that is in the depot."""

    digest: str
    size: int
    diff_id: str


async def build(recipe: Recipe, name: Name, depot: Depot, architecture: str, base: Image | None) -> Record:
    """Make the image and keep it under ``name``. ``base`` is what the recipe begins with, if that is an image."""
    identity = await anyio.to_thread.run_sync(recipe.identity)
    if (record := await anyio.to_thread.run_sync(_made_before, depot, name, architecture, identity)) is not None:
        return record
    layers = []
    if base is not None:
        if base.write_tar is None:
            raise ConfigError(f"base={recipe.base!r} is a disk, which has no layers")
        layers.append(await _layer(depot, base.write_tar))
    if recipe.packages:
        layers.append(await _packages(recipe, depot, architecture))
    if recipe.files:
        layers.append(await _layer(depot, lambda dest: _write_files(recipe, dest)))
    config = base.config if base is not None else ImageConfig(env={"PATH": PATH}, cmd=("/bin/sh",))
    return _keep(depot, name, architecture, _config(recipe, config, identity, architecture, layers), layers)


def _made_before(depot: Depot, name: Name, architecture: str, identity: str) -> Record | None:
    record = depot.find(str(name), go_architecture(architecture))
    with suppress(ImageError):
        if record is not None and depot.describe(record).config.labels.get(LABEL) == identity:
            depot.use(record)
            return record if all(depot.blob(digest).exists() for digest in depot.digests(record)) else None
    return None


def _config(
    recipe: Recipe, base: ImageConfig, identity: str, architecture: str, layers: list[Built]
) -> dict[str, Any]:
    env = {**base.env, **recipe.env}
    return {
        "architecture": go_architecture(architecture), "os": "linux",
        "config": {
            "Env": [f"{name}={value}" for name, value in env.items()],
            "Cmd": list(recipe.cmd or base.cmd), "Entrypoint": list(recipe.entrypoint or base.entrypoint),
            "User": recipe.user or base.user, "WorkingDir": recipe.workdir or base.workdir,
            "Labels": {**base.labels, LABEL: identity},
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }  # fmt: skip


def _keep(depot: Depot, name: Name, architecture: str, config: dict[str, Any], layers: list[Built]) -> Record:
    described = _document(depot, config, CONFIG)
    manifest = _document(depot, {
        "schemaVersion": 2, "mediaType": MANIFESTS[0], "config": described,
        "layers": [{"mediaType": LAYER, "digest": layer.digest, "size": layer.size} for layer in layers],
    }, MANIFESTS[0])
    descriptor = Descriptor(MANIFESTS[0], manifest["digest"], manifest["size"], Platform("", ""))
    record = Record(str(name), go_architecture(architecture), descriptor.digest, descriptor)
    depot.save(record)
    return record


def _document(depot: Depot, value: dict[str, Any], media_type: str) -> dict[str, Any]:
    raw = json.dumps(value, sort_keys=True).encode()
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    depot.put(digest, raw)
    return {"mediaType": media_type, "digest": digest, "size": len(raw)}


# --- layers ---


class _AbandonedError(Exception):
    """Nobody waits for this layer any more."""


async def _layer(depot: Depot, write_tar: WriteTar) -> Built:
    """A layer of what ``write_tar`` writes. The thread that is left when this is cancelled ends as soon as it looks."""
    stop = Event()

    def poll() -> None:
        if stop.is_set():
            raise _AbandonedError

    try:
        return await anyio.to_thread.run_sync(_pack, depot, write_tar, poll, abandon_on_cancel=True)
    finally:
        stop.set()


def _pack(depot: Depot, write_tar: WriteTar, poll: Callable[[], None]) -> Built:
    folder = depot.path / "blobs" / "sha256"
    with explained(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = folder / f"{os.urandom(8).hex()}.new"
        try:
            with fresh.open("xb") as file:
                packing = _Packing(file, poll)
                write_tar(cast(IO[bytes], packing))
                built = packing.finish()
            fresh.rename(depot.blob(built.digest))
        finally:
            fresh.unlink(missing_ok=True)
    return built


class _Packing:
    """Compresses a tar into a file, and hashes both."""

    def __init__(self, file: IO[bytes], poll: Callable[[], None]) -> None:
        self._file = file
        self.flush = poll
        self._zstd = zstandard.ZstdCompressor(level=LEVEL).compressobj()
        self._plain, self._packed, self._size = hashlib.sha256(), hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.flush()
        self._plain.update(data)
        self._add(self._zstd.compress(bytes(data)))
        return len(data)

    def finish(self) -> Built:
        self._add(self._zstd.flush())
        self._file.flush()
        return Built(f"sha256:{self._packed.hexdigest()}", self._size, f"sha256:{self._plain.hexdigest()}")

    def _add(self, packed: bytes) -> None:
        self._packed.update(packed)
        self._size += len(packed)
        self._file.write(packed)


def _write_files(recipe: Recipe, dest: IO[bytes]) -> None:
    out = Output(dest)
    for path, given in sorted(recipe.files.items()):
        with _opened(given.content) as (size, file):
            uid, gid = given.owner
            out.write(header(Entry(path.encode(), Kind.FILE, given.mode, uid, gid, size=size, stored=size)))
            left = size
            while left:
                data = file.read(min(left, CHUNK))
                if not data:
                    raise ConfigError(f"a file for {path} became shorter while it was read")
                out.write(data)
                left -= len(data)
            out.write(padding(size))
    out.write(END)
    out.flush()


@contextmanager
def _opened(content: bytes | Path) -> Iterator[tuple[int, IO[bytes]]]:
    if isinstance(content, bytes):
        yield len(content), io.BytesIO(content)
        return
    try:
        file = content.open("rb")
    except OSError as exc:
        raise ConfigError(f"can't read {content!s}: {exc.strerror}") from exc
    with file:
        yield os.fstat(file.fileno()).st_size, file


# --- packages ---


async def _packages(recipe: Recipe, depot: Depot, architecture: str) -> Built:
    """What mmdebstrap makes of the packages. It needs no root: it has user namespaces."""
    tool = host.find_tool("mmdebstrap", package="mmdebstrap")
    suite, sources = recipe.suite, recipe.sources
    if not suite or not sources:
        suite, sources = await _apt_sources(suite)
    with explained(depot.path):
        depot.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=host.BUILDING, dir=depot.path) as work:
        tar = Path(work, "packages.tar")
        await host.run_tool([
            tool, "--quiet", "--variant=minbase", f"--include={','.join(recipe.packages)}", "--format=tar",
            f"--architectures={DEBIAN[go_architecture(architecture)]}", "--aptopt=Acquire::Languages none",
            suite, str(tar), *sources,
        ], env={**host.TOOL_ENV, "SOURCE_DATE_EPOCH": "0", "HOME": work, "TMPDIR": work})
        return await _layer(depot, lambda dest: _copy(tar, dest))


def _copy(tar: Path, dest: IO[bytes]) -> None:
    with tar.open("rb") as file:
        while chunk := file.read(CHUNK):
            dest.write(chunk)


async def _apt_sources(suite: str) -> tuple[str, tuple[str, ...]]:
    """A release of Debian, and where apt of this machine gets it (nothing: mmdebstrap knows a place)."""
    apt = host.find_tool("apt-get", package="apt")
    fields = "$(CODENAME)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)|$(ORIGIN)"
    listed = await host.run_tool([apt, "indextargets", "--format", fields, "Created-By: Packages"])
    found = [line.split("|") for line in sorted(set(listed.decode().splitlines()))]
    debian = [(codename, source) for codename, source, origin in found if origin.startswith("Debian")]
    suite = suite or next((codename for codename, _ in debian if "-" not in codename), "stable")
    return suite, tuple(source for codename, source in debian if codename.split("-")[0] == suite)
