"""The directories of a user."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from pykata import HostError, NotPermittedError
from pykata.host import cache_dir, run_dir, state_dir
from pykata.template_cache import folder_of

VARIABLES = ("PYKATA_CACHE", "XDG_CACHE_HOME", "PYKATA_STATE", "XDG_STATE_HOME")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home directory that isn't there yet, and nothing that says where else to be."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(("directory", "variable", "below"), [
    (cache_dir, "PYKATA_CACHE", ".cache/pykata"), (state_dir, "PYKATA_STATE", ".local/state/pykata"),
])  # fmt: skip
def test_a_home_that_is_not_there_is_not_made(
    home: Path, directory: Callable[[], Path], variable: str, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostError, match=f"{home} isn't there") as caught:
        directory()
    assert variable in caught.value.hint
    assert not home.exists()
    home.mkdir()
    assert directory() == home / below
    monkeypatch.setenv(variable, str(home.parent / "own"))
    home.rename(home.parent / "moved")
    assert directory() == home.parent / "own"


def test_a_home_that_cant_be_looked_at(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "is_dir", hidden)     # root may look at every one
    with pytest.raises(NotPermittedError, match=f"can't use {home}: Permission denied") as caught:
        cache_dir()
    assert "PYKATA_CACHE" in caught.value.hint


def test_without_a_home_there_are_no_templates(home: Path) -> None:
    with pytest.raises(OSError, match="isn't there"):       # which is no hindrance to a boot
        folder_of({})


async def test_a_run_directory_that_cant_be_made_whole_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where no descriptors are left, which it takes to look into one."""
    monkeypatch.setenv("PYKATA_RUN", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(first := os.dup(0))        # the lowest number that is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (first, hard))
    try:
        with pytest.raises(HostError, match="Too many open files"):
            async with run_dir():
                pytest.fail("there is one")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not os.listdir(tmp_path)
