"""Builds the guest's kernel from Debian's kernel source and our config fragments."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import anyio
from attrs import frozen

from pykata.errors import BundleBuildError, ConfigError, ToolMissingError
from pykata.guest.inputs import compiler_files, file_hashes, host_arch, kernel_files, kernel_patches
from pykata.guest.steps import Progress, count_lines, need_tools, run_logged, run_quiet
from pykata.host import file_hash

RECIPE = "2"
"""Of this file: change it when the same inputs give another kernel."""

_TOOLS = {
    "make": "make", "gcc": "gcc", "ld": "binutils", "flex": "flex", "bison": "bison", "bc": "bc", "xz": "xz-utils",
    "tar": "tar", "strip": "binutils", "perl": "perl", "patch": "patch", "awk": "mawk",
}
_FILES = {"/usr/include/libelf.h": "libelf-dev"}

# Nothing of the machine that builds may get into the kernel: not its clock, its user, its name.
_FIXED = {
    "KBUILD_BUILD_TIMESTAMP": "2025-01-01 00:00:00 UTC",
    "KBUILD_BUILD_USER": "pykata",
    "KBUILD_BUILD_HOST": "pykata",
    "KBUILD_BUILD_VERSION": "1",
    "SOURCE_DATE_EPOCH": "1735689600",
    "TZ": "UTC",
}
_PRECOMPILED = "fs/precompiled"         # of a directory whose files get no options of their own
_VERBS = tuple(f"  {verb} " for verb in ("CC", "AS", "AR", "LD", "HOSTCC", "OBJCOPY", "GEN", "VDSO"))


@frozen
class _Target:
    arch: str           # as the kernel's Makefile calls it
    cross: str          # prefix of a cross compiler's programs, and of its Debian package
    goal: str
    result: str
    lines: int          # what `make` says in a whole build, for the progress


_TARGETS = {
    # PVH enters the ELF file itself: no decompression.
    "x86_64": _Target("x86_64", "x86_64-linux-gnu-", "vmlinux", "vmlinux", 2206),
    "aarch64": _Target("arm64", "aarch64-linux-gnu-", "Image", "arch/arm64/boot/Image", 1700),
}


def parse_config(text: str) -> dict[str, str]:
    """The options of a config file or a fragment; one that "is not set" is ``"n"``."""
    options = {}
    for line in text.splitlines():
        if match := re.match(r"# (CONFIG_\w+) is not set$", line):
            options[match[1]] = "n"
        elif match := re.match(r"(CONFIG_\w+)=(.*)$", line):
            options[match[1]] = match[2]
    return options


def dropped_options(config: str, fragments: Iterable[str]) -> list[str]:
    """The options of ``fragments`` that aren't so in ``config``: Kconfig drops silently what it can't fulfil."""
    final = parse_config(config)
    wanted = {name: value for fragment in fragments for name, value in parse_config(fragment).items()}
    return [f"{name}={value}" for name, value in sorted(wanted.items()) if final.get(name, "n") != value]


def source_pin(root: Path) -> Mapping[str, str]:
    """Which Debian package the kernel is built from (``guest/kernel/source.json``)."""
    pin: Mapping[str, str] = json.loads((root / "guest" / "kernel" / "source.json").read_text())
    return pin


async def kernel_inputs(root: Path, arch: str) -> dict[str, str]:
    """Everything the kernel depends on, by name."""
    pin, target = source_pin(root), _target(arch)
    _need(pin, arch)
    return {
        "recipe": RECIPE,
        "source": f"{pin['package']} {await _package_version(pin['package'])}",
        "source.sha256": await anyio.to_thread.run_sync(file_hash, Path(pin["tarball"])),
        "gcc": await _first_line([_cross(arch, target) + "gcc", "--version"]),
        "ld": await _first_line([_cross(arch, target) + "ld", "--version"]),
        **file_hashes(root, kernel_files(root, arch)),
    }


def _need(pin: Mapping[str, str], arch: str) -> None:
    need_tools(_tools(arch))
    files = {**_FILES, pin["tarball"]: pin["package"]}
    missing = sorted({package for name, package in files.items() if not Path(name).exists()})
    if missing:
        hint = f"apt-get install {' '.join(missing)}"
        raise ToolMissingError("what the kernel is built from isn't installed", hint=hint)


async def build_kernel(root: Path, arch: str, work: Path, progress: Progress) -> Path:
    """Build the kernel below ``work`` and return its file, stripped."""
    target, tree, log = _target(arch), work / "linux", work / "kernel.log"
    tree.mkdir()
    progress("kernel", 0, target.lines, "unpacking the source")
    await run_logged(["tar", "xf", source_pin(root)["tarball"], "--strip-components=1", "-C", str(tree)], log)
    for patch in kernel_patches(root):
        await run_logged(["patch", "-p1", "--forward", "-i", patch], log, cwd=tree)
    await _configure(root, arch, tree, log)
    await _precompile(root, arch, tree, log)
    # Built inside the source tree, so that every path in it is a relative one.
    await run_logged(
        [*_make(arch), target.goal], log, cwd=tree, env=_environment(arch),
        on_line=count_lines(_VERBS, "kernel", target.lines, progress),
    )
    return await _stripped(arch, tree / target.result, work / "vmlinux", log)


async def _precompile(root: Path, arch: str, tree: Path, log: Path) -> None:
    """Have guest/kernel/cc parse beforehand what nearly every file includes: it halves the work of the whole build."""
    for path in compiler_files(root):
        shutil.copy(path, tree.parent)
    (tree / _PRECOMPILED).with_suffix(".c").touch()
    await run_logged([*_make(arch), f"{_PRECOMPILED}.o"], log, cwd=tree, env=_environment(arch))


async def _configure(root: Path, arch: str, tree: Path, log: Path) -> None:
    fragments = [path for path in kernel_files(root, arch) if path.suffix == ".config"]
    # -n: everything that no fragment asks for is off.
    merge = [str(tree / "scripts/kconfig/merge_config.sh"), "-n", *map(str, fragments)]
    await run_logged(merge, log, cwd=tree, env=_environment(arch))
    dropped = dropped_options((tree / ".config").read_text(), [path.read_text() for path in fragments])
    if dropped:
        raise BundleBuildError(
            f"the kernel's config lost {len(dropped)} requested options: {' '.join(dropped)}",
            hint="a dependency is missing in guest/kernel, or the option has gone from this kernel version",
        )


async def _stripped(arch: str, built: Path, result: Path, log: Path) -> Path:
    if _target(arch).goal == "vmlinux":
        await run_logged([_cross(arch) + "strip", "--strip-all", "-o", str(result), str(built)], log)
    else:
        shutil.copyfile(built, result)
    return result


def _target(arch: str) -> _Target:
    if arch not in _TARGETS:
        raise ConfigError(f"no guest kernel for the architecture {arch!r}", hint=f"one of {', '.join(_TARGETS)}")
    return _TARGETS[arch]


def _cross(arch: str, target: _Target | None = None) -> str:
    return "" if arch == host_arch() else (target or _target(arch)).cross


def _make(arch: str) -> list[str]:
    names = (f"ARCH={_target(arch).arch}", f"CROSS_COMPILE={_cross(arch)}", "CC=../cc")
    return ["make", *names, f"-j{len(os.sched_getaffinity(0))}"]


def _environment(arch: str) -> dict[str, str]:
    return {**_FIXED, "ARCH": _target(arch).arch, "CROSS_COMPILE": _cross(arch)}


def _tools(arch: str) -> dict[str, str]:
    prefix = _cross(arch)
    return {**_TOOLS, f"{prefix}gcc": f"gcc-{prefix.rstrip('-')}"} if prefix else _TOOLS


async def _first_line(argv: list[str]) -> str:
    return (await run_quiet(argv)).splitlines()[0]


async def _package_version(package: str) -> str:
    return (await run_quiet(["dpkg-query", "-W", "-f", "${Version}", package])).strip()
