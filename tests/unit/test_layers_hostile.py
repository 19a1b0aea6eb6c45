"""Layers that aren't what they should be: each is refused with an error that names the layer and what is wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import tarfile
from collections.abc import Iterable
from functools import partial
from typing import IO

import pytest

from pykata.errors import ImageCorruptError, ImageError, ImageUnsupportedError
from pykata.images.layer import Layer
from pykata.images.layers import write_layers
from pykata.images.limits import DEFAULT_LIMITS, Limits
from tests.images_fixtures import (
    Item,
    compress,
    digest_of,
    file,
    folder,
    hardlink,
    layer_of,
    look,
    merged_tar,
    symlink,
    tar_of,
    whiteout,
)

TAR = tar_of([file("a", b"content" * 1000), folder("d")])


def refused(layers: Iterable[Layer], limits: Limits = DEFAULT_LIMITS) -> ImageCorruptError:
    out = io.BytesIO()
    with pytest.raises(ImageCorruptError) as caught:
        write_layers(list(layers), limits, out)
    assert not out.getvalue(), "something was written before all was verified"
    return caught.value


# --- digests and sizes ---


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
def test_one_wrong_byte_is_found(compression: str) -> None:
    stored = bytearray(compress(TAR, compression))
    good = layer_of(TAR, compression)
    for at in range(0, len(stored), max(1, len(stored) // 40)):
        stored[at] ^= 1
        error = refused([Layer("L", partial(io.BytesIO, bytes(stored)), good.digest, good.size, good.diff_id)])
        assert good.digest == error.digest
        stored[at] ^= 1


def test_the_digest_of_the_stored_bytes_is_verified() -> None:
    wrong = digest_of(b"other")
    error = refused([layer_of(TAR, "gzip", digest=wrong)])
    assert error.digest == wrong
    assert f"instead of {wrong}" in str(error)


def test_the_diff_id_is_verified() -> None:
    wrong = digest_of(b"other", "sha512")
    error = refused([layer_of(TAR, "gzip", diff_id=wrong)])
    assert error.digest == wrong
    assert f"instead of its diff_id {wrong}" in str(error)


def test_sha512() -> None:
    layer = layer_of(TAR, digest=digest_of(TAR, "sha512"), diff_id=digest_of(TAR, "sha512"))
    assert merged_tar([layer]) == merged_tar([layer_of(TAR)])


@pytest.mark.parametrize("more", [-1, 1])
def test_the_size_is_verified(more: int) -> None:
    assert "bytes instead of" in str(refused([layer_of(TAR, size=len(TAR) + more)]))


def test_bytes_after_the_end_of_the_archive_count() -> None:
    layer = layer_of(TAR, "gzip", diff_id=digest_of(TAR[:-512]))
    assert "diff_id" in str(refused([layer]))


def test_a_layer_that_changes_between_the_passes() -> None:
    other = tar_of([file("a", b"CONTENT" * 1000), folder("d")])
    versions = [TAR, other]
    layer = Layer("L", lambda: io.BytesIO(versions.pop(0)))
    with pytest.raises(ImageCorruptError, match="changed while it was read"):
        merged_tar([layer])


class Failing(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        raise OSError(5, "Input/output error")


def test_a_layer_that_can_t_be_read() -> None:
    with pytest.raises(ImageError, match=r"can't read layer L: .*Input/output"):
        merged_tar([Layer("L", Failing)])


# --- what is in them ---


@pytest.mark.parametrize(("lower", "upper", "why"), [
    ([], [file("../evil")], "entry '../evil': its path has '..' in it"),
    ([], [file("a/../../evil")], "'..'"),
    ([], [symlink("a", "/etc"), file("a/passwd")], "entry 'a/passwd': 'a' in its path is a symlink"),
    ([symlink("a", "/etc")], [file("a/passwd")], "entry 'a/passwd': 'a' in its path is a symlink"),
    ([symlink("a", "b")], [folder("a/x")], "is a symlink"),
    ([file("a")], [file("a/b")], "'a' in its path is a file"),
    ([Item("a", tarfile.FIFOTYPE)], [file("a/b/c")], "'a' in its path is a fifo"),
    ([], [file("./", b"x")], "replaces the root"),
    ([], [symlink(".", "/")], "replaces the root"),
    ([], [hardlink("a", "b")], "entry 'a': it is a hard link to 'b', which isn't a file"),
    ([], [hardlink("a", "a")], "hard link to 'a'"),
    ([folder("d")], [hardlink("a", "d")], "isn't a file"),
    ([folder("d")], [hardlink("a", "")], "isn't a file"),
    ([file("x")], [whiteout("x"), hardlink("a", "x")], "isn't a file"),
    ([], [hardlink("a", "../../etc/shadow")], "'..'"),
    ([symlink("s", "d"), folder("d"), file("d/f")], [hardlink("a", "s/f")], "isn't a file"),
    ([], [whiteout("")], "a whiteout of no name"),
    ([], [Item(".wh..")], "a whiteout of no name"),
    ([], [Item("d/.wh...")], "a whiteout of no name"),
    ([], [file("n" * 256)], "256 bytes"),
    ([], [file("a/" * 2049 + "f")], "4099 bytes"),
])
def test_what_makes_no_tree_is_refused(lower: list[Item], upper: list[Item], why: str) -> None:
    bad = layer_of(tar_of(upper), name="the bad one")
    error = refused([layer_of(tar_of(lower)), bad])
    assert why in str(error)
    assert "layer the bad one is refused" in str(error)
    assert error.digest == bad.digest


def test_an_error_shows_no_control_characters() -> None:
    error = refused([layer_of(tar_of([file("../\x1b[31m\n\u202e")]))])
    assert str(error).isprintable()


def test_absolute_names_are_below_the_root() -> None:
    tar = tar_of([file("/etc/x"), hardlink("/y", "/etc/x")])
    assert set(look(merged_tar([layer_of(tar)]))) == {"", "etc", "etc/x", "y"}


def test_a_deep_tree_needs_no_recursion() -> None:
    deep = "/".join(["d"] * 2000)
    layers = [[file(f"{deep}/f")], [file(f"{deep}/g"), Item("d/.wh..wh..opq")], [whiteout("d")]]
    for count in (1, 2, 3):
        merged_tar([layer_of(tar_of(items)) for items in layers[:count]])


def test_many_whiteouts_of_the_same_tree_take_no_longer() -> None:
    lower = [file(f"d/{number}") for number in range(3000)]
    upper = [file(f"d/n{number}") for number in range(3000)] + [Item("d/.wh..wh..opq"), whiteout("d")] * 3000
    merged_tar([layer_of(tar_of(lower)), layer_of(tar_of(upper))])      # a quadratic way takes minutes


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
def test_a_truncated_layer(compression: str) -> None:
    stored = compress(TAR[:3000], compression)
    error = refused([Layer("L", lambda: io.BytesIO(stored), digest_of(stored), len(stored), digest_of(TAR[:3000]))])
    assert "layer L is damaged: truncated" in str(error)


def test_what_is_no_tar() -> None:
    assert "checksum" in str(refused([layer_of(b"#!/bin/sh\n" * 1000)]))


def test_an_unknown_compression() -> None:
    stored = bz2.compress(TAR)
    with pytest.raises(ImageUnsupportedError, match=r"bzip2.*gzip or zstd"):
        merged_tar([Layer("L", lambda: io.BytesIO(stored))])


# --- limits ---


def test_a_bomb_is_refused() -> None:
    bomb = tar_of([file("zeros", bytes(20_000_000))])
    layer = layer_of(bomb, "gzip")
    assert layer.size is not None
    assert layer.size < 50_000
    error = refused([layer], Limits(size=10_000_000))
    assert "more than 10000000 bytes" in str(error)


def test_the_size_is_that_of_all_layers() -> None:
    layer = layer_of(tar_of([file("a", bytes(100_000))]), "zstd")
    merged_tar([layer] * 3, Limits(size=400_000))
    refused([layer] * 4, Limits(size=400_000))


def test_what_follows_the_archive_counts_as_well() -> None:
    refused([layer_of(TAR + bytes(1_000_000), "gzip")], Limits(size=500_000))


def test_too_many_entries_layers_and_holes() -> None:
    layer = layer_of(tar_of([file(str(number)) for number in range(10)]))
    assert "more than 19 entries" in str(refused([layer, layer], Limits(entries=19)))
    assert "more than 2" in str(refused([layer] * 3, Limits(layers=2)))
    longest = layer_of(tar_of([file("/".join(["x" * 250] * 16) + f"/{number}") for number in range(20)]))
    assert "names and attributes" in str(refused([longest], Limits(names=80_000)))
    attributes = layer_of(tar_of([file(str(number), xattrs={"user.x": bytes(60_000)}) for number in range(20)]))
    assert "names and attributes" in str(refused([attributes], Limits(names=1_000_000)))
    header = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n39 GNU.sparse.realsize=999999999999999\n"
    pax = tarfile.TarInfo("x")
    pax.type, pax.size = b"x", len(header)
    sparse = tarfile.TarInfo("f")
    sparse.size = 512
    tar = (pax.tobuf(tarfile.USTAR_FORMAT) + header.ljust(512, b"\0") + sparse.tobuf(tarfile.USTAR_FORMAT)
           + b"1\n0\n0\n".ljust(512, b"\0"))
    assert "pretend to be larger" in str(refused([layer_of(tar)]))


# --- giving up ---


class Impatient(io.BytesIO):
    """A destination that nobody waits for any more."""

    def flush(self) -> None:
        raise InterruptedError

    def write(self, data: object, /) -> int:
        raise AssertionError("nothing is written")


def test_the_destination_can_end_it_before_anything_is_written() -> None:
    opened: list[IO[bytes]] = []

    def open_it() -> IO[bytes]:
        opened.append(io.BytesIO(gzip.compress(TAR)))
        return opened[-1]

    with pytest.raises(InterruptedError):
        write_layers([Layer("L", open_it)], DEFAULT_LIMITS, Impatient())
    assert [one.closed for one in opened] == [True]
