"""The public namespace: small, sorted, documented, and importing it does nothing."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pykata

# Imported where they are used: each costs tens of milliseconds, and `pykata.Sandbox(...)` needs none of them.
LATE = {"grpclib", "h2", "betterproto2", "qemu", "qemu.qmp", "pyroute2", "httpx", "zstandard"}

PROBE = """
import json, os, sys, threading
before = set(os.listdir("/proc/self/fd"))
children = lambda: open(f"/proc/self/task/{os.getpid()}/children").read()
import pykata
print(json.dumps({
    "threads": [thread.name for thread in threading.enumerate()],
    "tasks": len(os.listdir("/proc/self/task")),
    "children": children(),
    "descriptors": sorted(set(os.listdir("/proc/self/fd")) - before),
    "modules": sorted(sys.modules),
}))
"""


def test_all_is_sorted() -> None:
    # As ruff sorts it: constants, classes, the rest.
    def rank(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert pykata.__all__ == sorted(pykata.__all__, key=rank)
    assert len(set(pykata.__all__)) == len(pykata.__all__)


def test_all_is_all() -> None:
    tree = ast.parse(inspect.getsource(pykata))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    homes = {node.module: {each.name for each in node.names} for node in imports}
    assert set().union(*homes.values()) == set(pykata.__all__) <= set(dir(pykata))
    del homes["pykata.errors"]
    assert homes == {module: set(names.split()) for module, names in pykata._HOMES.items()}


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sandwich'"):
        pykata.Sandwich  # type: ignore[attr-defined]  # noqa: B018


def test_no_public_name_is_a_module_of_ours() -> None:
    # Importing the module would put it in the name's place.
    modules = {path.stem for path in Path(pykata.__file__).parent.iterdir()}
    assert not modules & set(pykata.__all__)


def test_every_error_is_public() -> None:
    from pykata import errors

    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert {name for name in classes if name.endswith("Error")} <= set(pykata.__all__)


@pytest.mark.parametrize("name", pykata.__all__)
def test_documented(name: str) -> None:
    value = getattr(pykata, name)
    assert inspect.getdoc(value), f"{name} has no docstring"
    if not inspect.isclass(value):
        return
    ours = [base for base in value.__mro__ if base.__module__.startswith("pykata.")]
    undocumented = [
        member
        for base in ours
        for member, what in vars(base).items()
        if not member.startswith("_") and (callable(what) or isinstance(what, property)) and not inspect.getdoc(what)
    ]
    assert not undocumented, f"{name} has members without docstrings"


def test_the_reference_has_all_of_a_sandbox() -> None:
    # It lists them, in an order for readers, where it takes all members of other classes.
    text = (Path(__file__).parents[2] / "docs/reference/api.md").read_text()
    (listed,) = re.findall(r"autoclass:: pykata\.Sandbox\n((?:\n|   .*\n)+)", text)
    members = {name for name in dir(pykata.Sandbox) if not name.startswith("_")} | {"options"}
    assert set(re.findall(r"auto\w+:: (\w+)", listed)) == members


def test_importing_does_nothing() -> None:
    found = json.loads(subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True).stdout)
    assert found["threads"] == ["MainThread"]
    assert found["tasks"] == 1
    assert found["children"].strip() == ""
    assert found["descriptors"] == []
    assert LATE & set(found["modules"]) == set()


def test_the_error_tree_in_the_docstring_is_the_tree() -> None:
    from pykata import errors

    drawn = [line for line in (errors.__doc__ or "").splitlines() if "Error" in line and line.startswith("    ")]
    parents: list[str] = []
    for line in drawn:
        name = line.strip(" │├└─").split()[0]
        depth = (line.index(name) - 4) // 4
        parents[depth:] = [name]
        bases = [base.__name__ for base in getattr(errors, name).__mro__]
        assert depth == 0 or parents[depth - 1] == bases[1], f"{name} is drawn below {parents[depth - 1]}"
    public = {name for name in vars(errors) if name.endswith("Error")}
    assert {line.strip(" │├└─").split()[0] for line in drawn} == public
