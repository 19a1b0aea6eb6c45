"""Makes the image of a recipe: the layers of what it begins with, and one for each of its steps.

A layer is known by all that it was made of: what the image begins with, and every step up to it. So it is made once,
also for other recipes that begin the same way, and by one process at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
from attrs import asdict, evolve, frozen

from pykata import host
from pykata.errors import ImageError, PykataError
from pykata.images.base import base_layers
from pykata.images.config import Platform, go_architecture
from pykata.images.depot import Depot, Record, explained
from pykata.images.document import parse_document
from pykata.images.manifest import MANIFESTS, Descriptor
from pykata.images.name import Name
from pykata.images.pack import Built, copy_file, digest_of, pack
from pykata.images.recipe import PATH, FilesStep, Recipe, RunStep
from pykata.images.recipe_files import write_files
from pykata.spec import BuildEvent, Image, ImageConfig

LABEL = "io.pykata.recipe"
CONFIG = "application/vnd.oci.image.config.v1+json"

RunCommand = Callable[[str, RunStep, Path, Callable[[bytes], None]], Awaitable[None]]
"""Runs a step's command in the image of this reference, and writes what it changed to the path, as a layer. The last
argument gets what the command writes."""


@frozen
class Builder:
    """Where an image is made: the depot, for which architecture, and what runs commands."""

    depot: Depot
    architecture: str
    run: RunCommand
    report: Callable[[BuildEvent], None]


async def build(recipe: Recipe, name: Name, builder: Builder, base: Image | None) -> Record:
    """Make the image and keep it under ``name``. ``base`` is what the recipe begins with, if that is an image."""
    config = base.config if base is not None else ImageConfig(env={"PATH": PATH}, cmd=("/bin/sh",))
    keys = await _keys(recipe, builder, config, base)
    identity = _hash(keys[-1], _configured(recipe, config), sorted(recipe.labels.items()), recipe.ports)
    total = len(recipe.steps)
    record = await anyio.to_thread.run_sync(_made_before, builder, name, identity)
    if record is not None:
        for number, step in enumerate(recipe.steps, 1):
            builder.report(BuildEvent(number, total, describe(step), "cached"))
        return record
    layers = await _first_layers(recipe, builder, base, keys[0])
    for number, (step, key) in enumerate(zip(recipe.steps, keys[1:], strict=True), 1):
        report = partial(_report, builder, number, total, step)
        make = partial(_step, step, builder, config, layers, partial(report, "output"))
        layers = [*layers, await _made_once(builder, key, make, report)]
    document = _document_of(builder, _configured(recipe, config), layers)
    document["config"]["Labels"] = {**config.labels, **recipe.labels, LABEL: identity}
    if recipe.ports:
        document["config"]["ExposedPorts"] = {port if "/" in port else f"{port}/tcp": {} for port in recipe.ports}
    return await anyio.to_thread.run_sync(_keep, builder, name, document, layers)


def describe(step: FilesStep | RunStep) -> str:
    """A step in a few words."""
    if isinstance(step, RunStep):
        return f"run {step.cmd[-1] if step.cmd[1:2] == ('-c',) else ' '.join(step.cmd)}"
    paths = sorted(step.files)
    return f"files /{paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "") if paths else "files"


def _report(builder: Builder, number: int, total: int, step: FilesStep | RunStep, status: Any,
            output: bytes = b"") -> None:
    builder.report(BuildEvent(number, total, describe(step), status, output))


# --- what is known ---


def _hash(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


async def _keys(recipe: Recipe, builder: Builder, config: ImageConfig, base: Image | None) -> list[str]:
    """What tells the image after each step from others, beginning with what it is before the first."""
    architecture = go_architecture(builder.architecture)
    begins = base.digest if base is not None else (recipe.packages, recipe.suite, recipe.sources)
    keys = [_hash("begins", begins, architecture)]
    for step in recipe.steps:
        if isinstance(step, FilesStep):
            what: tuple[object, ...] = ("files", await digest_of(partial(write_files, step)))
        else:
            at = _during(step, config)
            what = "run", step.cmd, sorted(at.env.items()), at.user, at.workdir
        keys.append(_hash(keys[-1], *what))
    return keys


def _during(step: RunStep, base: ImageConfig) -> ImageConfig:
    """The config of the image that a command is run in."""
    return evolve(base, env={**base.env, **step.env}, user=step.user or base.user, workdir=step.workdir or base.workdir)


def _configured(recipe: Recipe, base: ImageConfig) -> ImageConfig:
    cmd = base.cmd if recipe.entrypoint is None else ()
    return evolve(
        base, env={**base.env, **recipe.env}, user=recipe.user or base.user, workdir=recipe.workdir or base.workdir,
        entrypoint=base.entrypoint if recipe.entrypoint is None else recipe.entrypoint,
        cmd=cmd if recipe.cmd is None else recipe.cmd, stop_signal=recipe.stop_signal or base.stop_signal, labels={},
    )


def _made_before(builder: Builder, name: Name, identity: str) -> Record | None:
    depot = builder.depot
    record = depot.find(str(name), go_architecture(builder.architecture))
    with suppress(ImageError):
        if record is not None and depot.describe(record).config.labels.get(LABEL) == identity:
            depot.use(record)
            return record if all(depot.blob(digest).exists() for digest in depot.digests(record)) else None
    return None


# --- layers ---


async def _first_layers(recipe: Recipe, builder: Builder, base: Image | None, key: str) -> list[Built]:
    if base is not None:
        return await base_layers(recipe.base, base, builder.depot, lambda make: _made_once(builder, key, make))
    if recipe.packages:
        from pykata.images.debian import make_packages

        return [await _made_once(builder, key, partial(make_packages, recipe, builder.depot, builder.architecture))]
    return []


async def _made_once(
    builder: Builder, key: str, make: Callable[[], Awaitable[Built]], report: Callable[[str], None] = lambda _: None
) -> Built:
    """The layer of this key: made before, by another process meanwhile, or now."""
    path = builder.depot.path / "steps" / f"{key}.json"
    with explained(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with host.locked(path.with_suffix(".lock")):
        found = await anyio.to_thread.run_sync(_find_made, builder.depot, path)
        if found is not None:
            report("cached")
            return found
        report("running")
        made = await make()
        await anyio.to_thread.run_sync(builder.depot.write, path, json.dumps(asdict(made)).encode())
        report("done")
        return made


def _find_made(depot: Depot, path: Path) -> Built | None:
    try:
        said = parse_document(path.read_bytes(), "step")
        built = Built(said.get("digest").text(), said.get("size").integer(), said.get("diff_id").text())
        if not depot.has(built.digest, built.size):
            return None
        os.utime(path)
        return built
    except (OSError, PykataError):
        return None


async def _step(
    step: FilesStep | RunStep, builder: Builder, base: ImageConfig, layers: Sequence[Built],
    wrote: Callable[[bytes], None],
) -> Built:
    if isinstance(step, FilesStep):
        return await pack(builder.depot, partial(write_files, step))
    depot = builder.depot
    with tempfile.TemporaryDirectory(prefix=host.BUILDING, dir=depot.path) as work:
        layout, changed = Path(work, "layout"), Path(work, "changed.tar")
        await anyio.to_thread.run_sync(_lay_out, builder, layout, _during(step, base), layers)
        with _named(layout) as name:
            await builder.run(f"oci:{name}", step, changed, wrote)
        return await pack(depot, partial(copy_file, changed))


@contextmanager
def _named(layout: Path) -> Iterator[Path]:
    """A name for the layout that has no colon in it, for what follows one is a tag."""
    if ":" not in str(layout):
        yield layout
        return
    descriptor = os.open(layout, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


# --- documents ---


def _document_of(builder: Builder, config: ImageConfig, layers: Sequence[Built]) -> dict[str, Any]:
    return {
        "architecture": go_architecture(builder.architecture), "os": "linux",
        "config": {
            "Env": [f"{name}={value}" for name, value in config.env.items()], "Cmd": list(config.cmd),
            "Entrypoint": list(config.entrypoint), "User": config.user, "WorkingDir": config.workdir,
            **({"StopSignal": config.stop_signal} if config.stop_signal else {}),
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }  # fmt: skip


def _described(put: Callable[[str, bytes], None], value: Mapping[str, Any], media_type: str) -> dict[str, Any]:
    raw = json.dumps(value, sort_keys=True).encode()
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    put(digest, raw)
    return {"mediaType": media_type, "digest": digest, "size": len(raw)}


def _manifest(put: Callable[[str, bytes], None], config: dict[str, Any], layers: Sequence[Built]) -> dict[str, Any]:
    return _described(put, {
        "schemaVersion": 2, "mediaType": MANIFESTS[0], "config": _described(put, config, CONFIG),
        "layers": [{"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size} for layer in layers],
    }, MANIFESTS[0])


def _keep(builder: Builder, name: Name, config: dict[str, Any], layers: Sequence[Built]) -> Record:
    manifest = _manifest(builder.depot.put, config, layers)
    descriptor = Descriptor(MANIFESTS[0], manifest["digest"], manifest["size"], Platform("", ""))
    record = Record(str(name), go_architecture(builder.architecture), descriptor.digest, descriptor)
    builder.depot.save(record)
    return record


def _lay_out(builder: Builder, layout: Path, config: ImageConfig, layers: Sequence[Built]) -> None:
    """An OCI layout of what was made so far; its layers stay where they are."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for layer in layers:
        target = layout / "blobs" / layer.digest.replace(":", "/")
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(builder.depot.blob(layer.digest))

    def put(digest: str, raw: bytes) -> None:
        (blobs / digest.partition(":")[2]).write_bytes(raw)

    manifest = _manifest(put, _document_of(builder, config, layers), layers)
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
