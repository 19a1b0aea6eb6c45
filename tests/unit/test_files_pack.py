"""Large files of the host on their way into a pipe: by the kernel where it can, and copied where it can't."""

from __future__ import annotations

import errno
import io
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import anyio
import pytest

from pykata.files import pack
from pykata.files.pack import MUCH, PIECE, Sink, write_tree
from pykata.host import PipeReader
from tests.pipes import read_meanwhile

NOISE = random.Random(1).randbytes(2 * PIECE + 12345)
SIZES = (0, 1, 511, MUCH - 1, MUCH, MUCH + 1, PIECE, PIECE + 1, len(NOISE))


def refuse(*_: object, **__: object) -> int:
    raise OSError(errno.EINVAL, "not this file")


def packed(top: Path) -> bytes:
    """What is written of a tree, read by another thread meanwhile: it is more than a pipe takes."""
    return read_meanwhile(lambda writer: write_tree(os.fsencode(top), writer))[1]


@pytest.mark.parametrize("splice", [None, refuse], ids=["moved", "copied"])
def test_sizes_around_the_borders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splice: Callable[..., int] | None
) -> None:
    if splice is not None:
        monkeypatch.setattr(os, "splice", splice)
    for size in SIZES:
        (tmp_path / str(size)).write_bytes(NOISE[:size])
    with tarfile.open(fileobj=io.BytesIO(packed(tmp_path))) as tar:
        found = {entry.name: cast(IO[bytes], tar.extractfile(entry)).read() for entry in tar if entry.isreg()}
    assert set(found) == {str(size) for size in SIZES}
    assert all(data == NOISE[: int(name)] for name, data in found.items())


def test_a_file_that_becomes_shorter_is_filled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(NOISE[: 2 * PIECE])
    move = Sink.move

    def shortened(self: Sink, source: int, offset: int, length: int) -> int:
        os.truncate(file, PIECE + 100)
        return move(self, source, offset, length)

    monkeypatch.setattr(pack.Sink, "move", shortened)
    with tarfile.open(fileobj=io.BytesIO(packed(tmp_path))) as tar:
        found = cast(IO[bytes], tar.extractfile("file")).read()
    assert found == NOISE[: PIECE + 100] + bytes(PIECE - 100)


def test_other_errors_are_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(NOISE)
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        write_tree(os.fsencode(tmp_path), writer)


async def test_a_space_is_filled_however_the_data_comes() -> None:
    reader, writer = os.pipe()

    def write() -> None:
        for at in range(0, 1500, 300):
            os.write(writer, NOISE[at : at + 300])

    async with PipeReader(cast(IO[bytes], os.fdopen(reader, "rb", buffering=0))) as out:
        space = memoryview(bytearray(1000))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, write)
            assert await out.receive_into(space) == 1000
        assert space == NOISE[:1000]
        os.close(writer)
        assert await out.receive_into(space) == 500
        assert space[:500] == NOISE[1000:1500]
        assert await out.receive_into(space) == 0
