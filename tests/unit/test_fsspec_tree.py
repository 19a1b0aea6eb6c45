"""A filesystem of fsspec as a tree for a guest: what is counted, and what two do at once. No guest asks here."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

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


def test_empty_directories_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykata.fs.fsspec_directories.MAX_EMPTY", 3)
    store, tree = stored(**{"x/y": b"1"})
    for path in ("a", "a/b", "c"):
        tree.mkdir(path)
    with pytest.raises(OSError, match="too many empty directories") as caught:
        tree.mkdir("d")
    assert (caught.value.errno, names(tree), tree.quota.files) == (errno.ENOSPC, ["a", "c", "x"], 97)
    tree.rename("a", "d")
    tree.rmdir("c")
    tree.mkdir("d/e")
    assert (names(tree), names(tree, "d")) == (["d", "x"], ["b", "e"])
    tree.remove("x/y")          # there is no room to keep the directory, which is no reason to keep the file
    assert (names(tree), store.keys) == (["d"], {})
    write(tree, "d/b/f")        # and one that the store has needs none
    tree.mkdir("g")
    assert names(tree) == ["d", "g"]


@pytest.mark.parametrize("below", ["directories", "file"])
def test_nothing_is_renamed_to_where_its_path_is_too_long(below: str) -> None:
    store, tree = stored()
    path = "d"
    tree.mkdir(path)
    for _ in range(16):
        path = f"{path}/{'n' * 250}"
        tree.mkdir(path)
    opened = None
    if below == "file":
        path = f"{path}/f"
        opened = tree.open(path, write=True, create=True, exclusive=True, truncate=False)
    before = dict(store.keys)
    with pytest.raises(OSError, match="too long") as caught:
        tree.rename("d", "D" * 200)
    assert caught.value.errno == errno.ENAMETOOLONG
    assert (names(tree), store.keys) == (["d"], before)
    tree.rename("d", "D")
    assert tree.stat("D" + path[1:]).is_directory == (opened is None)
    if opened is not None:
        opened.close()


def test_a_read_only_volume_of_nothing_is_no_empty_directory(tmp_path: Path) -> None:
    tree = FsspecTree(LocalFileSystem(), str(tmp_path / "typo"), readonly=True, buffer=0)
    with pytest.raises(FileNotFoundError):
        tree.list("")


# --- errors that pass ---


def rename_file(tree: FsspecTree) -> None:
    tree.rename("a", "b")


def rename_directory(tree: FsspecTree) -> None:
    tree.rename("d", "e")


def remove_directory(tree: FsspecTree) -> None:
    tree.rmdir("d")


@pytest.mark.parametrize("does", [rename_file, rename_directory, remove_directory])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "slow down"), RuntimeError("slow down")])
def test_what_fails_is_not_said_to_be_done(does: Callable[[FsspecTree], None], error: Exception) -> None:
    class Failing(Memory):
        """What is asked of it fails once."""

        left = 0

        def info(self, path: str, **more: Any) -> Any:
            self.left -= 1
            if not self.left:
                raise error
            return super().info(path, **more)

    refused = 0
    for number in range(1, 20):
        fs = Failing()
        fs.pipe({"/top/a": b"new", "/top/b": b"old"})
        fs.mkdir("/top/d")
        fs.mkdir("/top/e")
        tree = FsspecTree(fs, "/top", readonly=False, buffer=1 << 20)
        fs.left = number
        is_done = False
        with suppress(type(error)):
            does(tree)
            is_done = True
        has_failed, fs.left = fs.left <= 0, 0
        assert (("a" if does is rename_file else "d") in names(tree)) != is_done
        refused += not is_done
        if not has_failed:
            break
    assert is_done, "what nothing fails in is done"
    assert refused


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


class Sftp(ObjectStore):
    """Its ``mv`` takes what ``SFTPFileSystem``'s takes, and replaces nothing."""

    def mv(self, old: str, new: str) -> None:
        if self.exists(new):
            raise FileExistsError(new)
        for key in [key for key in self.keys if key == old or key.startswith(f"{old}/")]:
            self.keys[new + key[len(old):]] = self.keys.pop(key)


def directory_of(store: ObjectStore) -> DirFileSystem:
    """Its directory "b"; what it would have an event loop for, and a thread for that, isn't asked here."""
    return DirFileSystem("b", store, loop=object(), skip_instance_cache=True)


def test_a_mv_gets_no_more_than_it_takes() -> None:
    for prefix in ("", "b/"):
        store = Sftp(**{f"{prefix}a": b"1", f"{prefix}d/e": b"2"})
        fs = directory_of(store) if prefix else store
        tree = FsspecTree(fs, "", readonly=False, buffer=1 << 20)
        tree.rename("a", "c")
        tree.rename("d", "f")
        assert store.keys == {f"{prefix}c": b"1", f"{prefix}f/e": b"2"}


def test_a_mv_that_must_be_told_of_directories_is() -> None:
    class Told(ObjectStore):
        asked: list[tuple[str, bool]]

        def mv(self, path1: str, path2: str, recursive: bool = False, **more: Any) -> None:
            self.asked.append((path1, recursive))

    store = Told(**{"a": b"1", "d/e": b"2"})
    store.asked = []
    tree = FsspecTree(store, "", readonly=False, buffer=1 << 20)
    tree.rename("a", "c")
    tree.rename("d", "f")
    assert store.asked == [("a", False), ("d", True)]


def test_what_a_directory_of_object_storage_has_is_moved_one_by_one() -> None:
    store = ObjectStore(**{"b/d/e/f": b"1", "b/d/g": b"2", "b/a*": b"3", "b/ab": b"4"})
    tree = FsspecTree(directory_of(store), "", readonly=False, buffer=1 << 20)
    tree.rename("d", "c")
    tree.rename("a*", "new")
    assert store.keys == {"b/c/e/f": b"1", "b/c/g": b"2", "b/new": b"3", "b/ab": b"4"}


def test_a_directory_that_lists_itself_is_moved() -> None:
    class Listing(ObjectStore):
        def ls(self, path: str, detail: bool = True, **more: Any) -> list[Any]:
            here = {"name": f"{path}/", "size": 0, "type": "directory"}
            return [here if detail else here["name"], *super().ls(path, detail, **more)]

    store = Listing(**{"d/e/f": b"1", "d/g": b"2"})
    tree = FsspecTree(store, "", readonly=False, buffer=1 << 20)
    tree.rename("d", "c")
    assert store.keys == {"c/e/f": b"1", "c/g": b"2"}
    assert names(tree, "c") == ["e", "g"]


def test_a_local_file_is_renamed_whatever_it_is_called(tmp_path: Path) -> None:
    tree = FsspecTree(LocalFileSystem(), str(tmp_path), readonly=False, buffer=1 << 20)
    for name in ("a", "a[1]", "*"):
        (tmp_path / name).write_bytes(b"content")
        before = (tmp_path / name).stat().st_ino
        tree.rename(name, "new")
        assert (tmp_path / "new").stat().st_ino == before
        assert os.listdir(tmp_path) == ["new"]
        (tmp_path / "new").unlink()


def test_one_that_is_asynchronous_gets_no_pattern() -> None:
    class Falls(ObjectStore):
        """With a ``mv`` of its own for some names, and that of fsspec for the others."""

        async_impl = True

        def mv(self, path1: str, path2: str, **more: Any) -> None:
            super().mv(path1, path2, **more)

    store = Falls(**{"a*": b"1", "ab": b"2"})
    FsspecTree(store, "", readonly=False, buffer=1 << 20).rename("a*", "new")
    assert store.keys == {"new": b"1", "ab": b"2"}


def test_one_whose_mv_replaces_nothing() -> None:
    store = Sftp(a=b"a", b=b"b")
    tree = FsspecTree(store, "", readonly=False, buffer=1 << 20)
    opened = tree.open("b", write=True, create=False, exclusive=False, truncate=False)
    opened.write(0, b"late")
    tree.rename("a", "b")
    opened.close()          # of what was replaced, which is nobody's any more
    assert store.keys == {"b": b"a"}
