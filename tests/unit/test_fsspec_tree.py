"""A filesystem of fsspec as a tree for a guest: what is counted, and what two do at once. No guest asks here."""

from __future__ import annotations

import errno
import threading
from contextlib import suppress
from typing import Any

import pytest

from pykata.fs.fsspec_tree import FsspecTree
from pykata.fs.quota import Quota
from tests.unit.memory_tree import Memory, memory


def test_what_was_never_handed_over_was_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    fs, tree = memory(quota=Quota(size=100))

    def full(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "the store is full")

    with monkeypatch.context() as patched:
        patched.setattr(fs, "pipe_file", full)
        for truncate in (True, True, False, False):
            opened = tree.open("a", write=True, create=False, exclusive=False, truncate=truncate)
            if not truncate:
                opened.write(0, bytes(97))
            with pytest.raises(OSError, match="the store is full"):
                opened.close()
            assert tree.quota.size == 100
    tree.truncate("a", 0)
    assert tree.quota.size == 107
    opened = tree.open("a", write=True, create=False, exclusive=False, truncate=False)
    opened.write(0, bytes(20))
    tree.remove("a")
    opened.close()
    assert tree.quota.size == 107


@pytest.mark.parametrize("meanwhile", ["truncate", "remove"])
def test_what_is_removed_is_counted_once(meanwhile: str) -> None:
    class Slow(Memory):
        """While one removes a file, somebody else is at it. That it is gone already is no error."""

        others: list[threading.Thread]

        def rm_file(self, path: str) -> None:
            if not self.others:
                self.others.append(threading.Thread(target=other))
                self.others[0].start()
                self.others[0].join(0.2)    # it waits for this removal, or else it is done by then
            self.store.pop(path, None)

    def other() -> None:
        with suppress(FileNotFoundError):
            opened.truncate(0) if meanwhile == "truncate" else tree.remove("a")

    fs = Slow()
    fs.others = []
    fs.pipe({"/top/a": b"content"})
    tree = FsspecTree(fs, "/top", readonly=False, buffer=1 << 20, quota=Quota(size=100, files=10))
    opened = tree.open("a", write=True, create=False, exclusive=False, truncate=False)
    tree.remove("a")
    fs.others[0].join()
    opened.close()
    assert (tree.quota.size, tree.quota.files) == (107, 11)


@pytest.mark.parametrize("moved", [("d/f", "d/g", "d/g"), ("d", "e", "e/f")])
@pytest.mark.parametrize("meanwhile", ["close", "open"])
def test_what_is_written_while_it_is_renamed_is_kept(moved: tuple[str, str, str], meanwhile: str) -> None:
    old, new, then = moved

    class Slow(Memory):
        """While one moves a file, which is to copy and to remove it, somebody else is at it."""

        def rm(self, path: Any, **more: Any) -> None:
            others.append(threading.Thread(target=other, daemon=True))
            others[0].start()
            others[0].join(0.2)         # it waits for the move, or else it is done by then
            super().rm(path, **more)

    def other() -> None:
        if meanwhile == "open":
            with suppress(FileNotFoundError):
                tree.open("d/f", write=True, create=False, exclusive=False, truncate=True).close()
        opened.close()

    others: list[threading.Thread] = []
    fs = Slow()
    fs.pipe({"/top/d/f": b"before"})
    tree = FsspecTree(fs, "/top", readonly=False, buffer=1 << 20)
    opened = tree.open("d/f", write=True, create=False, exclusive=False, truncate=False)
    opened.write(0, b"behind")
    tree.rename(old, new)
    others[0].join(300)
    assert not others[0].is_alive()
    assert fs.cat_file(f"/top/{then}") == b"behind"
    assert not fs.exists("/top/d/f")
    assert not tree._nodes
