"""Merging layers: what applying them one after the other would give."""

from __future__ import annotations

import hashlib
import tarfile

import pytest

from pykata.errors import ImageCorruptError
from tests.images_fixtures import (
    CAPABILITY,
    Item,
    Seen,
    file,
    folder,
    hardlink,
    layer_of,
    look,
    merged,
    merged_tar,
    opaque,
    symlink,
    tar_of,
    whiteout,
)


def names(found: dict[str, Seen]) -> list[str]:
    return sorted(found)


def same_data(found: dict[str, Seen], name: str, data: bytes) -> bool:
    return found[name].data == hashlib.sha256(data).hexdigest()


def test_files_of_all_layers_are_there() -> None:
    found = merged([[folder("etc"), file("etc/a", b"a")], [file("etc/b", b"b")]])
    assert names(found) == ["", "etc", "etc/a", "etc/b"]


def test_an_upper_file_replaces_a_lower_one() -> None:
    found = merged([[file("a", b"old", mode=0o600)], [file("a", b"new", uid=7)]])
    assert same_data(found, "a", b"new")
    assert (found["a"].mode, found["a"].uid) == (0o644, 7)


def test_a_directory_takes_the_upper_attributes_and_keeps_what_is_in_it() -> None:
    found = merged([[folder("d", mode=0o700), file("d/a")], [folder("d", mode=0o1777, uid=3, mtime=5)]])
    assert names(found) == ["", "d", "d/a"]
    assert (found["d"].mode, found["d"].uid, found["d"].mtime) == (0o1777, 3, 5)


def test_a_missing_parent_is_made_and_a_lower_one_is_kept() -> None:
    found = merged([[folder("a", mode=0o711, uid=9)], [file("a/b/c")]])
    assert (found["a"].mode, found["a"].uid) == (0o711, 9)
    assert (found["a/b"].mode, found["a/b"].uid, found["a/b"].mtime) == (0o755, 0, 0)


def test_the_root_has_attributes() -> None:
    assert merged([[folder("./", mode=0o750, uid=4)]])[""].mode == 0o750
    assert merged([[file("a")]])[""].mode == 0o755


@pytest.mark.parametrize("lower", [[file("a")], [folder("a"), file("a/b")], [symlink("a", "b")]])
def test_a_whiteout_removes_what_lower_layers_have(lower: list[Item]) -> None:
    assert names(merged([[*lower, file("z")], [whiteout("a")]])) == ["", "z"]


def test_a_whiteout_of_nothing_is_nothing() -> None:
    upper = [whiteout("b"), whiteout("x/y"), whiteout("a/y"), opaque("q"), opaque("a")]
    assert names(merged([[file("a")], upper])) == ["", "a"]


@pytest.mark.parametrize("first", [True, False])
def test_a_whiteout_spares_its_own_layer(first: bool) -> None:
    upper = [whiteout("d"), folder("d"), file("d/new")]
    found = merged([[folder("d"), file("d/old"), folder("d/sub"), file("d/sub/x")], upper if first else upper[::-1]])
    assert names(found) == ["", "d", "d/new"]


def test_a_whiteout_spares_an_empty_directory_of_its_own_layer() -> None:
    found = merged([[folder("d", mode=0o700), file("d/old")], [folder("d", mode=0o711), whiteout("d")]])
    assert names(found) == ["", "d"]
    assert found["d"].mode == 0o711


@pytest.mark.parametrize("first", [True, False])
def test_an_opaque_directory_hides_what_lower_layers_have_in_it(first: bool) -> None:
    upper = [opaque("d"), file("d/new")]
    found = merged([[folder("d", mode=0o711), file("d/old"), file("e")], upper if first else upper[::-1]])
    assert names(found) == ["", "d", "d/new", "e"]
    assert found["d"].mode == 0o711


def test_an_opaque_root_hides_everything() -> None:
    assert names(merged([[file("a"), file("b/c")], [opaque(""), file("d")]])) == ["", "d"]


def test_what_was_hidden_may_come_back() -> None:
    found = merged([[folder("d"), file("d/a")], [whiteout("d")], [file("d/b")]])
    assert names(found) == ["", "d", "d/b"]


def test_a_file_replaces_a_directory_and_hides_what_was_in_it() -> None:
    found = merged([[folder("a"), file("a/b")], [file("a", b"x")], [whiteout("a")], [folder("a")]])
    assert names(found) == ["", "a"]
    assert found["a"].kind == tarfile.DIRTYPE


def test_a_directory_replaces_a_file_or_a_symlink() -> None:
    found = merged([[file("a"), symlink("b", "/etc")], [folder("a"), file("a/x"), folder("b"), file("b/y")]])
    assert names(found) == ["", "a", "a/x", "b", "b/y"]


def test_the_last_of_the_same_name_counts() -> None:
    found = merged([[file("a", b"1"), file("b", b"x"), file("a", b"2"), file("a", b"3", mode=0o600)]])
    assert same_data(found, "a", b"3")
    assert found["a"].mode == 0o600


def test_a_directory_that_is_there_twice_keeps_what_is_in_it() -> None:
    assert names(merged([[folder("d"), file("d/a"), folder("d", mode=0o700)]])) == ["", "d", "d/a"]


@pytest.mark.parametrize("upper", [[], [whiteout("a")], [file("a", b"other")], [folder("a")], [symlink("a", "b")]])
def test_a_hard_link_keeps_its_content(upper: list[Item]) -> None:
    found = merged([[file("a", b"content", mode=0o4755, xattrs={"user.x": b"1"}), hardlink("b", "a")], upper])
    assert same_data(found, "b", b"content")
    assert (found["b"].mode, found["b"].xattrs) == (0o4755, (("user.x", b"1"),))
    assert found["b"].names == ({"b"} if upper else {"a", "b"})


def test_a_hard_link_to_a_lower_layer() -> None:
    found = merged([[file("a", b"content")], [hardlink("b", "/a")], [whiteout("a"), hardlink("d/c", "b")]])
    assert names(found) == ["", "b", "d", "d/c"]
    assert found["b"].names == {"b", "d/c"}
    assert same_data(found, "d/c", b"content")


def test_a_hard_link_to_the_first_of_a_name_that_is_there_twice() -> None:
    found = merged([[file("a", b"1"), hardlink("b", "a"), file("a", b"2")]])
    assert same_data(found, "b", b"1")
    assert same_data(found, "a", b"2")
    assert found["a"].names == {"a"}


def test_a_hard_link_to_a_symlink_and_to_a_device() -> None:
    node = Item("n", tarfile.CHRTYPE, device=(1, 3))
    found = merged([[symlink("s", "x"), hardlink("t", "s"), node, hardlink("m", "n")]])
    assert found["t"].link == "x"
    assert found["t"].names == {"s", "t"}
    assert found["m"].device == (1, 3)
    assert found["m"].names == {"m", "n"}


def test_everything_about_a_file_is_kept() -> None:
    items = [
        folder("./", mode=0o755), folder("d", mode=0o2775, uid=1, gid=2),
        file("d/f", b"x" * 70000, mode=0o6755, uid=2**31, gid=2**32 - 2, mtime=1,
             xattrs={"security.capability": CAPABILITY, "user.bytes": bytes(range(256)), "user.empty": b""}),
        Item("d/c", tarfile.CHRTYPE, device=(259, 300), mode=0o620),
        Item("d/b", tarfile.BLKTYPE, device=(8, 2**20 - 1)),
        Item("d/p", tarfile.FIFOTYPE, mode=0o600), symlink("d/s", "../" * 50 + "x"),
        file("n" * 255, b"n"), file("/".join(["long" * 20] * 12), b"l"), file("caf\udce9/\udcff\udcfe", b"latin"),
        file("new\nline\\ \t'\"", b"odd"), file("empty"), file("old", mtime=-5), file("far", mtime=2**40),
    ]
    found = merged([items])
    expected = look(tar_of(items), whole=False)
    assert {name: seen for name, seen in found.items() if name in expected} == expected
    assert all(seen.kind == tarfile.DIRTYPE for name, seen in found.items() if name not in expected)


def test_attributes_of_overlayfs_are_not_the_images() -> None:
    xattrs = {"trusted.overlay.redirect": b"/etc", "user.overlay.opaque": b"y", "user.b": b"c"}
    found = merged([[file("a", xattrs=xattrs)]])
    assert found["a"].xattrs == (("user.b", b"c"),)


def test_what_aufs_left_in_layers_is_ignored() -> None:
    aufs = [folder(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", b"x"), file(".wh..wh.aufs"), file("d/.wh..wh.orph")]
    assert names(merged([[folder("d")], aufs])) == ["", "d"]


def test_no_layers_and_empty_layers() -> None:
    assert names(merged([])) == [""]
    assert names(merged([[], [file("a")], []])) == ["", "a"]
    assert names(look(merged_tar([layer_of(b"")]))) == [""]


def test_names_of_whiteouts_are_ordinary_in_a_root_filesystem() -> None:
    tar = tar_of([file("a"), file(".wh.a", b"x")])
    assert names(look(merged_tar([layer_of(tar, whiteouts=False)]))) == ["", ".wh.a", "a"]


def test_the_same_layers_give_the_same_bytes() -> None:
    layers = [layer_of(tar_of([file(f"d/{n}", bytes([n])) for n in range(50)])), layer_of(tar_of([whiteout("d/7")]))]
    assert merged_tar(layers) == merged_tar(layers)


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
def test_compressed_layers(compression: str) -> None:
    tar = tar_of([file("a", b"abc" * 200_000)])
    assert look(merged_tar([layer_of(tar, compression)])).keys() == {"", "a"}


def test_an_upper_entry_below_a_lower_symlink_is_refused() -> None:
    with pytest.raises(ImageCorruptError, match=r"layer sha256:.* entry 'bin/x': 'bin' in its path is a symlink"):
        merged([[symlink("bin", "usr/bin")], [file("bin/x")]])
