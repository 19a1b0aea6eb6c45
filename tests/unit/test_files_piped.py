"""What comes through a pipe and goes to files."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from pykata.files.piped import Piped
from pykata.images.stream import CHUNK, StreamError

DATA = random.Random(0).randbytes(3 * CHUNK + 77)


@contextmanager
def piped(data: bytes) -> Iterator[Piped]:
    """Reads what a thread writes."""
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb") as out:
            out.write(data)

    thread = Thread(target=write)
    thread.start()
    try:
        with Piped.reading(reader) as source:
            try:
                yield source
            finally:
                while os.read(reader, CHUNK):
                    pass
    finally:
        thread.join()


@pytest.mark.parametrize("first", [0, 1, 512, CHUNK, 2 * CHUNK + 5])
def test_parts_go_to_files_and_parts_are_read(first: int, tmp_path: Path) -> None:
    with piped(DATA) as source, (tmp_path / "file").open("wb", buffering=0) as file:
        assert source.read(first) == DATA[:first]
        source.copy(len(DATA) - first - 9, file.fileno())
        assert source.position == len(DATA) - 9
        assert source.read(9) == DATA[-9:]
        assert source.at_end()
    assert (tmp_path / "file").read_bytes() == DATA[first:-9]


def test_a_file_that_nothing_can_be_moved_to(tmp_path: Path) -> None:
    """Such as one to append to: it is written instead."""
    with piped(DATA) as source, (tmp_path / "file").open("ab", buffering=0) as file:
        source.copy(len(DATA), file.fileno())
        assert source.at_end()
    assert (tmp_path / "file").read_bytes() == DATA


def test_an_end_that_comes_early(tmp_path: Path) -> None:
    with (
        piped(DATA) as source, (tmp_path / "file").open("wb", buffering=0) as file,
        pytest.raises(StreamError, match="truncated: 1 bytes"),
    ):  # fmt: skip
        source.copy(len(DATA) + 1, file.fileno())


def test_a_host_without_room() -> None:
    with (
        piped(DATA) as source, Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(OSError, match="No space left"),
    ):  # fmt: skip
        source.copy(len(DATA), full.fileno())
