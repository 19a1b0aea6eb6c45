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
from tests.unit.object_store import ObjectStore


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

        def rm_file(self, path: str) -> None:
            others.append(threading.Thread(target=other, daemon=True))
            others[0].start()
            others[0].join(0.2)         # it waits for the move, or else it is done by then
            super().rm_file(path)

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


# --- directories that the filesystem has for as long as something is in them ---


def stored(**keys: bytes) -> tuple[ObjectStore, FsspecTree]:
    store = ObjectStore()
    store.keys = {f"b/{name}": content for name, content in keys.items()}
    return store, FsspecTree(store, "b", readonly=False, buffer=1 << 20, quota=Quota(files=100))


def write(tree: FsspecTree, path: str) -> None:
    opened = tree.open(path, write=True, create=True, exclusive=True, truncate=False)
    opened.write(0, path.encode())
    opened.close()


def names(tree: FsspecTree, path: str = "") -> list[str]:
    return sorted(name for name, _ in tree.list(path))


def test_a_directory_is_there_until_it_is_removed() -> None:
    store, tree = stored()
    assert names(tree) == []
    tree.mkdir("d")
    tree.mkdir("d/e")
    assert tree.stat("d").is_directory
    assert tree.stat("d/e").is_directory
    assert (names(tree), names(tree, "d"), names(tree, "d/e")) == (["d"], ["e"], [])
    with pytest.raises(FileExistsError):
        tree.mkdir("d/e")
    with pytest.raises(IsADirectoryError):
        tree.open("d/e", write=True, create=True, exclusive=False, truncate=False)
    with pytest.raises(OSError, match="not empty"):
        tree.rmdir("d")
    write(tree, "d/e/f")
    assert store.keys == {"b/d/e/f": b"d/e/f"}
    with pytest.raises(OSError, match="not empty"):
        tree.rmdir("d/e")
    tree.remove("d/e/f")
    assert names(tree, "d/e") == []
    tree.rmdir("d/e")
    assert names(tree, "d") == []
    tree.rmdir("d")
    assert (names(tree), store.keys, tree.quota.files) == ([], {}, 100)
    with pytest.raises(FileNotFoundError):
        tree.stat("d")


def test_what_was_there_before_is_removed_from_within() -> None:
    store, tree = stored(**{"d/e/f": b"1", "d/g": b"2"})
    tree.remove("d/e/f")
    assert names(tree, "d") == ["e", "g"]
    tree.rmdir("d/e")
    tree.remove("d/g")
    assert names(tree) == ["d"]
    tree.rmdir("d")
    assert not store.keys
    assert names(tree) == []


def test_what_the_program_removes_is_gone() -> None:
    store, tree = stored()
    tree.mkdir("d")
    write(tree, "d/f")
    store.keys.clear()
    assert names(tree) == []


def test_empty_directories_are_renamed() -> None:
    store, tree = stored(**{"x/y": b"1"})
    for path in ("d", "d/e", "over"):
        tree.mkdir(path)
    tree.rename("d", "c")
    assert (names(tree), names(tree, "c")) == (["c", "over", "x"], ["e"])
    write(tree, "c/f")
    tree.rename("c", "over")
    assert (names(tree), names(tree, "over")) == (["over", "x"], ["e", "f"])
    tree.rename("x/y", "over/e/y")
    assert store.keys == {"b/over/f": b"c/f", "b/over/e/y": b"1"}
    assert (names(tree), names(tree, "x")) == (["over", "x"], [])
    tree.rename("x", "over/x")
    assert names(tree, "over") == ["e", "f", "x"]


# --- renaming ---


@pytest.mark.parametrize("name", ["a*", "a?", "a[1]", "[!x]1"])
def test_a_name_is_no_pattern(name: str) -> None:
    for fs in (Memory(), ObjectStore()):
        for other in ("a1", "a2", "b1", name, f"d{name}/{name}", f"d{name}/a1"):
            fs.pipe_file(f"top/{other}", other.encode())
        tree = FsspecTree(fs, "top", readonly=False, buffer=1 << 20)
        tree.rename(name, "new")
        tree.rename(f"d{name}", "e")
        assert names(tree) == ["a1", "a2", "b1", "e", "new"]
        assert names(tree, "e") == sorted([name, "a1"])
        assert fs.cat_file("top/new") == name.encode()
        assert fs.cat_file("top/a1") == b"a1"
        tree.rename("new", name)
        assert fs.cat_file(f"top/{name}") == name.encode()


def test_a_file_that_is_to_be_replaced_stays_where_renaming_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **more: object) -> None:
        raise PermissionError("nobody moves anything here")

    store, tree = stored(a=b"a", b=b"b")
    monkeypatch.setattr(store, "cp_file", denied)
    with pytest.raises(PermissionError):
        tree.rename("a", "b")
    assert store.keys == {"b/a": b"a", "b/b": b"b"}
    assert tree.quota.files == 100
    monkeypatch.undo()
    tree.rename("a", "b")
    assert store.keys == {"b/b": b"a"}
    assert tree.quota.files == 101


def test_one_whose_mv_replaces_nothing() -> None:
    class Sftp(ObjectStore):
        def mv(self, path1: str, path2: str, **more: Any) -> None:
            if self.exists(path2):
                raise FileExistsError(path2)
            self.keys[path2] = self.keys.pop(path1)

    store = Sftp(a=b"a", b=b"b")
    tree = FsspecTree(store, "", readonly=False, buffer=1 << 20)
    opened = tree.open("b", write=True, create=False, exclusive=False, truncate=False)
    opened.write(0, b"late")
    tree.rename("a", "b")
    opened.close()          # of what was replaced, which is nobody's any more
    assert store.keys == {"b": b"a"}
