"""The compiler of the kernel's build, which parses common headers beforehand."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pykata.guest.inputs import compiler_files

ROOT = Path(__file__).resolve().parents[2]
HEADERS = "#define COMMON 42\n#define WHO KBUILD_MODNAME\nstatic inline int common(void) { return COMMON; }\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with the compiler beside it, as in a build."""
    for path in compiler_files(ROOT):
        shutil.copy(path, tmp_path)
    (tmp_path / "headers.h").write_text(HEADERS)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "local.h").write_text("extern int local;\n")
    return tmp_path / "tree"


def compiles(tree: Path, name: str, source: str, *options: str) -> bool:
    """Is ``source`` compiled, as a file of that name?"""
    (tree / f"{name}.c").write_text(source)
    words = ["../cc", f"-Wp,-MMD,.{name}.o.d", "-O2", f'-DKBUILD_MODNAME="{name}"', *options, "-c", "-o"]
    return subprocess.run([*words, f"{name}.o", f"{name}.c"], cwd=tree, capture_output=True).returncode == 0


def precompile(tree: Path) -> None:
    assert compiles(tree, "precompiled", "")


def test_before_there_is_a_precompiled_header_it_is_gcc(tree: Path) -> None:
    assert compiles(tree, "one", "int one = 1;\n")
    assert not compiles(tree, "two", "int two = COMMON;\n")


def test_every_file_has_the_common_headers_and_its_own_names(tree: Path) -> None:
    precompile(tree)
    assert compiles(tree, "one", "#include \"local.h\"\nchar one[] = WHO;\nint two(void) { return common(); }\n")
    assert b"one\0" in (tree / "one.o").read_bytes()
    assert compiles(tree, "other", "char other[] = WHO;\n")
    assert b"other\0" in (tree / "other.o").read_bytes()


def test_a_file_that_says_something_to_its_headers_gets_none(tree: Path) -> None:
    precompile(tree)
    assert not compiles(tree, "one", '#define LEVEL 5\n#include "local.h"\nint one = COMMON;\n')
    assert compiles(tree, "two", '#define pr_fmt(text) "two: " text\n#include "local.h"\nint two = COMMON;\n')


def test_other_options_get_none(tree: Path) -> None:
    precompile(tree)
    assert compiles(tree, "one", "#ifdef COMMON\n#error\n#endif\n", "-m32")


def test_a_file_that_the_headers_are_in_the_way_of_does_without(tree: Path) -> None:
    precompile(tree)
    assert compiles(tree, "one", "int common = 1;\n")


def test_what_is_wrong_is_said(tree: Path) -> None:
    precompile(tree)
    (tree / "one.c").write_text("int one = nothing;\n")
    done = subprocess.run(["../cc", "-c", "-o", "one.o", "one.c"], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 1
    assert "nothing" in done.stderr
