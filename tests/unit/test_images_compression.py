"""Decompression: what other programs write, in bounded pieces; damage and truncation are told."""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pykata.images.compression import WINDOW, ForeignCompressionError, decompressed
from pykata.images.stream import CHUNK, StreamError

TEXT = b"".join(b"%d bottles of beer\n" % number for number in range(60_000))
NOISE = os.urandom(300_000)
SKIPPABLE = b"\x5f\x2a\x4d\x18"


def chunked(raw: bytes, size: int) -> Iterator[bytes]:
    return (raw[at:at + size] for at in range(0, len(raw), size))


def plain(raw: bytes, size: int = 65536) -> bytes:
    return b"".join(decompressed(chunked(raw, size)))


def tool(*argv: str, data: bytes) -> bytes:
    return subprocess.run(argv, input=data, check=True, capture_output=True).stdout


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "gzip members": lambda data: gzip.compress(data[:1000]) + gzip.compress(b"") + gzip.compress(data[1000:]),
    "zstd": zstandard.compress,
    "zstd streamed": lambda data: tool("zstd", "-q", "-c", "-1", data=data),
    "zstd hard": lambda data: tool("zstd", "-q", "-c", "-19", "--long=27", data=data),
    "zstd without checksum": lambda data: tool("zstd", "-q", "-c", "--no-check", data=data),
    "zstd frames": lambda data: zstandard.compress(data[:7]) + zstandard.compress(b"") + zstandard.compress(data[7:]),
    "zstd skippable": lambda data: SKIPPABLE + b"\x03\0\0\0abc" + zstandard.compress(data) + SKIPPABLE + bytes(4),
    "xz": lzma.compress,
    "xz streams": lambda data: lzma.compress(data[:9]) + bytes(8) + lzma.compress(data[9:]) + bytes(4),
    "plain": bytes,
}


@pytest.mark.parametrize("data", [b"", b"a", TEXT, NOISE, bytes(CHUNK), bytes(5 * CHUNK + 1)], ids=len)
@pytest.mark.parametrize("how", COMPRESSED)
def test_it_is_what_was_compressed(how: str, data: bytes) -> None:
    raw = COMPRESSED[how](data)
    for size in (999, 10**7):
        assert plain(raw, size) == data


@pytest.mark.parametrize("how", [how for how in COMPRESSED if how != "plain"])
def test_truncation_is_told_wherever_it_is(how: str) -> None:
    raw = COMPRESSED[how](b"some text " * 20)
    accepted = []
    for length in range(10, len(raw)):
        with suppress(StreamError):
            plain(raw[:length])
            accepted.append(length)
    # Each complete member, frame or stream ends where a file may end; a few bytes of zeros are padding.
    assert len(accepted) <= (13 if how == "xz streams" else 2)


def test_a_truncated_frame_or_member_is_told() -> None:
    for how in ("gzip", "zstd", "zstd streamed", "zstd without checksum", "xz"):
        raw = COMPRESSED[how](TEXT)
        for length in (7, len(raw) // 2, len(raw) - 5, len(raw) - 1):
            with pytest.raises(StreamError):
                plain(raw[:length])


@pytest.mark.parametrize("how", ["gzip", "zstd", "xz"])
def test_something_else_after_the_end_is_told(how: str) -> None:
    with pytest.raises(StreamError):
        plain(COMPRESSED[how](TEXT) + b"something else")


@pytest.mark.parametrize("how", ["gzip", "zstd", "xz"])
def test_a_bomb_comes_in_small_pieces(how: str) -> None:
    raw = {"gzip": gzip.compress(bytes(64 * CHUNK)), "xz": lzma.compress(bytes(64 * CHUNK)),
           "zstd": zstandard.compress(bytes(64 * CHUNK))}[how]
    assert len(raw) < CHUNK
    pieces = [len(piece) for piece in decompressed(iter([raw]))]
    assert max(pieces) <= CHUNK
    assert sum(pieces) == 64 * CHUNK


def test_a_window_that_is_too_large_is_refused() -> None:
    assert WINDOW == 2**27
    with pytest.raises(StreamError, match="zstd"):
        plain(tool("zstd", "-q", "-c", "--ultra", "-3", "--long=28", data=TEXT))


@pytest.mark.parametrize("raw", [bz2.compress(TEXT), tool("lz4", "-c", "-", data=TEXT)])
def test_other_compressions_are_named(raw: bytes) -> None:
    with pytest.raises(ForeignCompressionError, match=r"bzip2|lz4"):
        plain(raw)


@functools.cache
def small(how: str) -> bytes:
    return COMPRESSED[how](TEXT[:3000])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([how for how in COMPRESSED if how != "plain"]), st.integers(0, 10**6), st.binary(max_size=3))
def test_damage_never_does_more_than_be_refused(how: str, at: int, damage: bytes) -> None:
    raw = bytearray(small(how))
    at %= len(raw)
    raw[at:at + 1] = damage
    with suppress(StreamError):
        assert len(plain(bytes(raw))) < 10**8
