"""What a bundle is made from: the files of the source tree, and their hash."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pykata.host import file_hash

FORMAT = 1
"""Of the manifest and of what the directory holds. A bundle of another format is as good as none."""

_AGENT_SUFFIXES = (".rs", ".toml", ".lock")
_NOT_BUILT_IN = {"target", "tests", "benches", "examples", "codegen"}


def host_arch() -> str:
    """The architecture of this machine, as the kernel names it (``x86_64``, ``aarch64``)."""
    return platform.machine()


def source_tree() -> Path | None:
    """The root of the source tree that this package is in, or None if it was installed without one."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "guest" / "kernel" / "base.config").is_file() else None


def kernel_files(root: Path, arch: str) -> list[Path]:
    """The kernel's config fragments in the order they are merged, its patches, and what it is built from and by."""
    folder = root / "guest" / "kernel"
    fragments = [*sorted(folder.glob("*.config")), *sorted((folder / arch).glob("*.config"))]
    return [*fragments, *kernel_patches(root), *compiler_files(root), folder / "source.json"]


def compiler_files(root: Path) -> list[Path]:
    """The compiler that the kernel's build calls, a script, and what it includes everywhere."""
    return [root / "guest" / "kernel" / name for name in ("cc", "headers.h")]


def kernel_patches(root: Path) -> list[Path]:
    """Our patches to the kernel, in the order they apply."""
    return sorted((root / "guest" / "kernel" / "patches").glob("*.patch"))


def agent_files(root: Path) -> list[Path]:
    """The sources of the agent. Its protocol's code is among them, generated beforehand."""
    return sorted(_sources(root / "guest" / "agent"))


def _sources(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _NOT_BUILT_IN]
        yield from (Path(where, name) for name in names if name.endswith(_AGENT_SUFFIXES))


def tree_hash(root: Path, arch: str) -> str:
    """The hash of all files of the tree that go into a bundle."""
    # Each start asks for it, and must not read a hundred files for that: sizes and times tell whether one has changed.
    stamps = (*_stamps(f"{root}/guest/kernel"), *_stamps(f"{root}/guest/agent"))
    return _tree_hash(root, arch, stamps)


def _stamps(folder: str) -> Iterator[tuple[str, int, int]]:
    """Of all files below, those that don't go into a bundle as well. As text: a Path takes longer than the stat(2)."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    found = entry.stat()
                    yield entry.path, found.st_size, found.st_mtime_ns
            elif entry.name not in _NOT_BUILT_IN:
                yield from _stamps(entry.path)


@lru_cache(maxsize=8)
def _tree_hash(root: Path, arch: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    return mapping_hash(file_hashes(root, [*kernel_files(root, arch), *agent_files(root)]))


def file_hashes(root: Path, files: list[Path]) -> dict[str, str]:
    """The SHA-256 of each file that exists, by its path below ``root``."""
    return {str(path.relative_to(root)): file_hash(path) for path in files if path.is_file()}


def mapping_hash(values: Mapping[str, str]) -> str:
    """One hash for names and their values, whatever their order."""
    lines = "".join(f"{name}\0{value}\n" for name, value in sorted(values.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
