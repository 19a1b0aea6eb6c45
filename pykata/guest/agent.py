"""Builds the guest's agent: a static Rust program."""

from __future__ import annotations

import os
from pathlib import Path

from pykata.errors import BundleBuildError
from pykata.guest.inputs import agent_files, file_hashes
from pykata.guest.steps import Progress, count_lines, need_tools, run_logged, run_quiet

RECIPE = "1"
"""Of this file: change it when the same inputs give another agent."""

_TOOLS = {"cargo": "cargo", "rustc": "rustc", "gcc": "gcc", "strip": "binutils"}
_NAME = "pykata-agent"


async def agent_inputs(root: Path, arch: str) -> dict[str, str]:
    """Everything the agent depends on, by name."""
    need_tools(_TOOLS)
    if not _manifest(root).is_file():
        raise BundleBuildError(f"there is no agent to build: {_manifest(root)}")
    return {
        "recipe": RECIPE,
        "rustc": (await run_quiet(["rustc", "--version"])).strip(),
        "target": _triple(arch),
        **file_hashes(root, agent_files(root)),
    }


async def build_agent(root: Path, arch: str, work: Path, target_dir: Path, progress: Progress) -> Path:
    """Build the agent and return its file. Compiled crates stay in ``target_dir`` for the next time."""
    crates = _manifest(root).with_name("Cargo.lock").read_text().count("[[package]]")
    argv = ["cargo", "build", "--release", "--locked", "--bin", _NAME, "--target", _triple(arch)]
    await run_logged(
        argv, work / "agent.log", cwd=_manifest(root).parent,
        env={"CARGO_TARGET_DIR": str(target_dir), "CARGO_ENCODED_RUSTFLAGS": "\x1f".join(_flags(root, target_dir))},
        on_line=count_lines(("   Compiling ",), "agent", crates, progress),
    )
    return target_dir / _triple(arch) / "release" / _NAME


def _flags(root: Path, target_dir: Path) -> list[str]:
    cargo_home = os.environ.get("CARGO_HOME") or str(Path.home() / ".cargo")
    places = {str(root): "/pykata", str(target_dir): "/target", cargo_home: "/cargo"}
    return [
        "-Ctarget-feature=+crt-static", "-Crelocation-model=static", "-Cstrip=symbols",
        "-Clink-arg=-Wl,--build-id=none",
        # Panic messages name source files: without the paths of whoever built it.
        *(f"--remap-path-prefix={path}={name}" for path, name in places.items()),
    ]


def _manifest(root: Path) -> Path:
    return root / "guest" / "agent" / "Cargo.toml"


def _triple(arch: str) -> str:
    return f"{arch}-unknown-linux-gnu"
