"""Tars on their way from a guest to whoever wants one, and back: written anew, whatever comes."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterator

import pytest

from pykata import ConfigError, UnsafeTreeError
from pykata.files.extract import Bounds
from pykata.files.tars import _from_guest, _to_guest
from pykata.files.values import Transfer
from pykata.images.entry import Entry, Kind
from pykata.images.tar_writer import END, header
from tests.images_fixtures import Item, file, folder, hardlink, symlink, tar_of
from tests.pipes import read_meanwhile

BOUNDS = Bounds(size=1_000_000, entries=100)
SPARSE = header(Entry(b"f", Kind.FILE, size=1 << 60, extents=())) + END      # nothing but a hole


def written(work: Callable[[int], Transfer]) -> tuple[Transfer, tarfile.TarFile]:
    """What ``work`` returns, and the tar that it writes to a pipe."""
    def to_the_end(writer: int) -> Transfer:
        try:
            return work(writer)
        finally:
            os.close(writer)

    done, data = read_meanwhile(to_the_end)
    return done, tarfile.open(fileobj=io.BytesIO(data))


def pieces(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1000] for at in range(0, len(data), 1000))


def from_guest(tar: bytes, *, is_tree: bool = True, bounds: Bounds = BOUNDS) -> tuple[Transfer, tarfile.TarFile]:
    return written(lambda out: _from_guest(pieces(tar), out, top=b"top", is_tree=is_tree, bounds=bounds))


def test_a_tree_has_its_name_before_all_others() -> None:
    data = os.urandom(5000)
    tar = tar_of([folder("."), folder("a"), file("a/f", data, mode=0o4755), hardlink("g", "a/f"), symlink("s", "../x")])
    done, tree = from_guest(tar)
    assert tree.getnames() == ["top", "top/a", "top/a/f", "top/g", "top/s"]
    content = tree.extractfile("top/a/f")
    assert content is not None
    assert content.read() == data
    assert (tree.getmember("top/g").linkname, tree.getmember("top/s").linkname) == ("top/a/f", "../x")
    assert (done.entries, done.size) == (5, 5000)


def test_a_file_is_called_as_it_was_asked_for() -> None:
    assert from_guest(tar_of([file("evil", b"x")]), is_tree=False)[1].getnames() == ["top"]


def test_symbolic_links_and_what_is_beside_them() -> None:
    items = [folder("."), symlink("s", "/etc"), hardlink("h", "s"), file("sx"), folder("d"), symlink("d/s", "..")]
    assert from_guest(tar_of(items))[1].getnames() == ["top", "top/s", "top/h", "top/sx", "top/d", "top/d/s"]


@pytest.mark.parametrize(("tar", "is_tree", "said"), [
    (tar_of([file("../up", b"x")]), True, "'..'"),
    (tar_of([file("f", bytes(1000))])[:700], True, "bad archive"),
    (b"no tar" * 200, True, "bad archive"),
    (tar_of([file("f", b"x")]) + b"more", True, "after the end"),
    (tar_of([file(f"f{number}") for number in range(101)]), True, "more than 100 entries"),
    (tar_of([file("f", bytes(1_000_001))]), True, "more than 1000000 bytes"),
    (tar_of([file("f"), file("g")]), False, "more than 1 entries"),
    (tar_of([symlink("f", "/etc/passwd")]), False, "something else"),
    (tar_of([symlink(".", "/etc")]), True, "something else than a directory"),
    (tar_of([symlink("s", "/etc"), file("s/passwd", b"x")]), True, "through a symbolic link"),
    (tar_of([symlink("s", "/etc"), folder("s/d/e")]), True, "through a symbolic link"),
    (tar_of([symlink("s", "/etc/passwd"), file("s", b"x")]), True, "through a symbolic link"),
    (tar_of([symlink("s", "/etc"), hardlink("h", "s"), file("h/passwd", b"x")]), True, "through a symbolic link"),
    (tar_of([symlink("s", "/etc"), hardlink("h", "s/passwd")]), True, "through a symbolic link"),
    (SPARSE, True, "more than 1000000 bytes"),
    (END, False, "an empty archive"),
    (END, True, "an empty archive"),
])  # fmt: skip
def test_what_a_guest_may_not_send(tar: bytes, is_tree: bool, said: str) -> None:
    with pytest.raises(UnsafeTreeError, match=said):
        from_guest(tar, is_tree=is_tree)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_any_writer_reach_the_guest(compress: Callable[[bytes], bytes], form: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("./d/f"))
        fifo = tarfile.TarInfo("pipe")
        fifo.type = tarfile.FIFOTYPE
        tar.addfile(fifo)
    done, read = written(lambda descriptor: _to_guest(pieces(compress(out.getvalue())), descriptor))
    assert (read.getnames(), done.skipped) == (["d/f"], ("pipe",))


def test_hard_links_to_what_is_left_out_are_left_out() -> None:
    fifo = Item("p", tarfile.FIFOTYPE)
    left_out = [fifo, hardlink("h", "p"), hardlink("i", "h")]
    tar = tar_of([*left_out, file("f"), hardlink("g", "f"), file("p"), hardlink("j", "p")])
    done, read = written(lambda out: _to_guest(pieces(tar), out))
    assert (read.getnames(), done.skipped) == (["f", "g", "p", "j"], ("p", "h", "i"))


def test_what_is_no_tar_is_named() -> None:
    with pytest.raises(ConfigError, match="the tar can't be unpacked"):
        written(lambda out: _to_guest(pieces(b"no tar" * 200), out))
    with pytest.raises(ConfigError, match=r"'a/\.\./b'"):
        written(lambda out: _to_guest(pieces(tar_of([file("a/../b")])), out))
