"""Who may import whom: the layers that docs/explain/architecture.md describes, held by reading the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pykata"

LEAVES = {"spec", "errors"}
GROUND = {"host", "transport"}
PARTS = {"hypervisors", "fs", "net", "images", "agent", "guest"}
"""They know the ground and themselves, never each other: what two of them share is a value in ``spec``."""

# The error that carries a Completed names its type; nothing is imported when it runs.
TYPES_ONLY = {("errors", "completed")}


def unit_of(path: Path) -> str:
    """The module or package right below pykata that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Everything of pykata that a file imports, wherever in it: the line, and the dotted name below ``pykata``."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name.partition(".")[2]) for name in names if _ours(name.name))
            case ast.ImportFrom(module="pykata", names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=str(module), level=0) if _ours(module):
                yield node.lineno, module.partition(".")[2]
            case ast.ImportFrom(level=level) if level > 0:
                yield node.lineno, f"(relative: {node.module})"


def _ours(module: str) -> bool:
    return module == "pykata" or module.startswith("pykata.")


def forbidden(unit: str, target: str) -> bool:
    """Must a file of ``unit`` not import from ``target``?"""
    if target == unit or (unit, target) in TYPES_ONLY:
        return False
    if unit in LEAVES:
        return True
    if unit in GROUND:
        return target not in LEAVES
    if unit in PARTS:
        return target not in LEAVES | GROUND
    # Everything else composes, except that nothing but the tests may need the fakes.
    return target == "testing"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    unit = unit_of(path)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {unit} imports pykata.{name}"
        for line, name in imported(path)
        if forbidden(unit, name.partition(".")[0])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_part_exists() -> None:
    # A part that was renamed would silently be free to import anything.
    assert {unit_of(path) for path in sources()} >= LEAVES | GROUND | PARTS


@pytest.mark.parametrize("path", sorted((ROOT / "adapters").rglob("*.py")), ids=lambda path: path.name)
def test_adapters_use_public_names_only(path: Path) -> None:
    import pykata

    wrong = [f"{line}: {name}" for line, name in imported(path) if name and name not in pykata.__all__]
    used = [
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pykata"
    ]
    assert not wrong
    assert set(used) <= set(pykata.__all__)


def test_only_host_spawns_processes() -> None:
    # The build of the guest bundle is a program of its own; it has its own way to run a compiler and keep its log.
    spawning = {"subprocess", "os.posix_spawn", "os.fork", "anyio.open_process", "anyio.run_process"}
    found = set()
    for path in sources():
        # These are not parts of this program: they become virtiofsd, slirp4netns and QEMU.
        apart = any(path.match(each) for each in ("fs/enter.py", "net/uplink.py", "net/gate.py"))
        if apart or unit_of(path) in {"host", "guest", "testing"}:
            continue
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if names & spawning or "import subprocess" in path.read_text():
            found.add(str(path.relative_to(ROOT)))
    assert not found
