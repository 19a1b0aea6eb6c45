"""Builds a guest bundle. What didn't change since the last time is taken from the cache."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
from attrs import field, frozen

from pykata.errors import BundleBuildError, BundleDamagedError, BundleMissingError, PykataError
from pykata.guest.agent import agent_inputs, build_agent
from pykata.guest.bundle import Bundle, load_bundle
from pykata.guest.busybox import build_busybox, busybox_inputs
from pykata.guest.cache import SHORT, cache_root, locked, part_path, publish, scratch
from pykata.guest.initrd import write_initrd
from pykata.guest.inputs import FORMAT, host_arch, mapping_hash, source_tree, tree_hash
from pykata.guest.kernel import build_kernel, kernel_inputs
from pykata.guest.steps import Progress, no_progress
from pykata.host import file_hash

_SUMS = "SHA256.json"
_Make = Callable[[Path], Awaitable[Mapping[str, Path]]]


@frozen
class _Part:
    """A piece of a bundle that is cached by itself. ``make`` builds its files below a directory it is given."""

    name: str
    inputs: Mapping[str, str] = field(hash=False)
    make: _Make

    @property
    def hash(self) -> str:
        return mapping_hash(self.inputs)


async def build_bundle(
    *, architecture: str = "", progress: Progress = no_progress, force: bool = False, root: Path | None = None
) -> Bundle:
    """Build the bundle of the source tree, or take it from the cache; ``force`` builds every part anew.

    The first time takes some minutes, for the kernel. Raises ToolMissingError (its hint names the Debian packages) and
    BundleBuildError (``output`` is the end of the log).
    """
    arch, root = architecture or host_arch(), (root or _tree()).absolute()
    cache = cache_root()
    async with locked(cache, lambda holder: progress("lock", 0, 0, f"waiting for {holder}")):
        tree = tree_hash(root, arch)
        parts = await _parts(root, arch, cache, progress)
        total = mapping_hash({part.name: part.hash for part in parts})
        target = cache / f"{arch}-{total[:SHORT]}"
        if not force and (bundle := await anyio.to_thread.run_sync(_intact, target)):
            return bundle
        made = await _make_parts(parts, cache, force)
        head = {"arch": arch, "hash": total, "tree": tree, "inputs": {part.name: part.inputs for part in parts}}
        await anyio.to_thread.run_sync(_assemble, made, head, target)
    return load_bundle(target)


def _tree() -> Path:
    if root := source_tree():
        return root
    raise BundleBuildError(
        "pykata is installed without the sources of the guest bundle",
        hint="install the package pykata-guest, or build in a checkout of the sources",
    )


def _intact(path: Path) -> Bundle | None:
    try:
        bundle = load_bundle(path)
        bundle.verify()
    except (BundleMissingError, BundleDamagedError):
        return None
    # The newest one is what an installation without sources boots.
    (path / "manifest.json").touch()
    return bundle


async def _parts(root: Path, arch: str, cache: Path, progress: Progress) -> tuple[_Part, ...]:
    async def kernel(work: Path) -> Mapping[str, Path]:
        return {"vmlinux": await build_kernel(root, arch, work, progress)}

    async def agent(work: Path) -> Mapping[str, Path]:
        return {"agent": await build_agent(root, arch, work, cache / "cargo", progress)}

    async def busybox(work: Path) -> Mapping[str, Path]:
        image, config = await build_busybox(arch, work, progress)
        return {image.name: image, config.name: config}

    return (
        _Part("kernel", await kernel_inputs(root, arch), kernel),
        _Part("agent", await agent_inputs(root, arch), agent),
        _Part("busybox", await busybox_inputs(arch), busybox),
    )


async def _make_parts(parts: tuple[_Part, ...], cache: Path, force: bool) -> dict[str, Path]:
    made: dict[str, Path] = {}

    async def one(part: _Part) -> None:
        made.update(await _make_part(part, cache, force))

    try:
        async with anyio.create_task_group() as tasks:
            for part in parts:
                tasks.start_soon(one, part)
    except BaseExceptionGroup as group:
        # One part failed and the others were cancelled: its error is what the caller wants.
        errors = group.subgroup(PykataError)
        raise (errors.exceptions[0] if errors and len(group.exceptions) == len(errors.exceptions) else group) from None
    return made


async def _make_part(part: _Part, cache: Path, force: bool) -> dict[str, Path]:
    target = part_path(cache, part.name, part.hash)
    if force or not await anyio.to_thread.run_sync(_whole, target):
        with scratch(cache) as work:
            files = await _logged(part, work, cache)
            await anyio.to_thread.run_sync(_keep, files, work / "out", target)
    os.utime(target)        # when it was used last
    return {path.name: path for path in target.iterdir() if path.name != _SUMS}


def _keep(files: Mapping[str, Path], out: Path, target: Path) -> None:
    out.mkdir()
    sums = {name: file_hash(shutil.copyfile(path, out / name)) for name, path in files.items()}
    (out / _SUMS).write_text(json.dumps(sums))
    target.parent.mkdir(exist_ok=True)
    publish(out, target)


async def _logged(part: _Part, work: Path, cache: Path) -> Mapping[str, Path]:
    try:
        return await part.make(work)
    except BundleBuildError as exc:
        # The scratch directory goes away; its log is what the user needs.
        kept = cache / f"{part.name}.log"
        if (log := work / f"{part.name}.log").exists():
            shutil.copyfile(log, kept)
        hint = exc.hint or f"its log is {kept}"
        raise BundleBuildError(f"{part.name}: {exc.message}", output=exc.output, hint=hint) from exc


def _whole(part: Path) -> bool:
    try:
        sums = json.loads((part / _SUMS).read_text())
        return all(file_hash(part / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def _assemble(made: Mapping[str, Path], head: Mapping[str, Any], target: Path) -> None:
    with scratch(target.parent) as work:
        out = work / "bundle"
        out.mkdir()
        for name in ("vmlinux", "busybox.squashfs", "busybox.json"):
            shutil.copyfile(made[name], out / name)
        write_initrd(made["agent"], out / "initrd.cpio")
        outputs = {path.name: {"sha256": file_hash(path), "size": path.stat().st_size} for path in out.iterdir()}
        manifest = {"format": FORMAT, **head, "outputs": outputs}
        (out / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        publish(out, target)
