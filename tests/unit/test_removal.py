"""Removing what a guest has filled: nothing stops it, and it touches nothing else."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from pykata.host import remove_tree


def test_all_kinds_of_entries_and_nothing_that_links_lead_to(tmp_path: Path) -> None:
    top, other = tmp_path / "top", tmp_path / "other"
    (top / "a/b/c").mkdir(parents=True)
    (top / "a/.0").mkdir()
    for taken in (".0/x", ".1"):        # names that are needed on the way
        (top / taken).mkdir(parents=True)
    (top / ".2").write_text("x")
    other.mkdir(mode=0o750)
    (other / "kept").write_text("kept")
    (top / "a/b/link").symlink_to(other)
    (top / "a/b/c/link").symlink_to(other / "kept")
    (top / "loop").symlink_to("loop")
    os.mkfifo(top / "a/fifo")
    os.link(other / "kept", top / "a/hard")
    (top / os.fsdecode(b"\xff\n")).mkdir()
    remove_tree(top)
    assert not os.path.lexists(top)
    assert (other / "kept").read_text() == "kept"
    assert other.stat().st_mode & 0o777 == 0o750


def test_what_isnt_there_and_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        remove_tree(tmp_path / "no")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(NotADirectoryError):
        remove_tree(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


def test_what_cant_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "top/d").mkdir(parents=True)
    (tmp_path / "top/d/f").touch()

    def refuse(name: str, **more: object) -> None:
        raise PermissionError(errno.EPERM, "immutable")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(PermissionError):
        remove_tree(tmp_path / "top")
    assert (tmp_path / "top/d/f").exists() or (tmp_path / "top/f").exists()


def test_who_goes_on_making_directories_cant_keep_it_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top, made, real = tmp_path / "top", count(), os.rmdir
    (top / "a/b").mkdir(parents=True)

    def rmdir(path: str | Path, **more: int) -> None:
        if (number := next(made)) < 1000:       # one that goes by, one that comes
            (top / f"new{number}/d").mkdir(parents=True)
        real(path, **more)

    monkeypatch.setattr(os, "rmdir", rmdir)
    with pytest.raises(OSError, match="not empty"):
        remove_tree(top)
    assert next(made) < 10
    assert {path.name[:3] for path in top.iterdir()} == {"new"}, "all that was there when it began is gone"


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can become another user")
def test_directories_that_their_owner_has_closed() -> None:
    """Root may go in anywhere; who else removes a volume may not, and the guest has made it as that user."""
    with tempfile.TemporaryDirectory(dir="/tmp") as home, ThreadPoolExecutor(1) as another:
        os.chmod(home, 0o777)  # noqa: S103
        another.submit(make_and_remove, Path(home, "top")).result()
        assert not os.listdir(home)


def make_and_remove(top: Path) -> None:
    # Of this thread alone, without root's rights on files: setfsuid(2), capabilities(7).
    ctypes.CDLL(None).setfsuid(65_533)
    (top / "a/b/c/d").mkdir(parents=True)
    (top / "a/b/f").touch()
    for path in ("a/b/c", "a/b", "a", "."):
        (top / path).chmod(0)
    with pytest.raises(PermissionError):
        os.listdir(top)
    remove_tree(top)
