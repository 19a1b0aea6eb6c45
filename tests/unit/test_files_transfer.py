"""Transfers on a host that has no descriptor or no thread left for them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import anyio
import pytest

from pykata import HostError
from pykata.files.piped import PIPE_SIZE, Piped
from pykata.files.tars import _passed
from pykata.files.tool import Tool
from pykata.files.transfer import _sent, received
from pykata.files.values import Transfer

GUARD = 300.0                   # seconds; only a hang takes that long
PIECE = bytes(64 * 1024)
MORE_THAN_A_PIPE_TAKES = 2 * PIPE_SIZE // len(PIECE)


class FakeTool:
    """Sends much, and takes all there is."""

    def __init__(self) -> None:
        self._left = MORE_THAN_A_PIPE_TAKES

    async def data(self) -> bytes:
        self._left -= 1
        return PIECE if self._left >= 0 else b""

    @contextmanager
    def diverted(self, pipe: int) -> Iterator[None]:
        yield

    async def send_from(self, fill: Callable[[memoryview], Awaitable[int]]) -> None:
        while await fill(memoryview(bytearray(len(PIECE)))):
            pass


def tool() -> Tool:
    return cast(Tool, FakeTool())


async def a_download() -> object:
    return await received(tool(), lambda source: source.read(1), Path("there"))


async def an_upload() -> object:
    return await _sent(tool(), lambda pipe: Transfer(0, 0), Path("there"))


async def a_tar() -> object:
    async def give(piece: bytes) -> None:
        pass

    return await _passed(FakeTool().data, give, lambda pieces, pipe: Transfer(0, 0))


TRANSFERS = pytest.mark.parametrize("transfer", [a_download, an_upload, a_tar])


@TRANSFERS
async def test_without_a_descriptor(
    transfer: Callable[[], Awaitable[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipe() -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pipe", pipe)
    with pytest.raises(HostError, match="Too many open files"):
        await transfer()


@TRANSFERS
async def test_without_a_thread(transfer: Callable[[], Awaitable[object]], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = os.pipe

    def pipe() -> tuple[int, int]:
        ends = make()
        made.append(os.readlink(f"/proc/self/fd/{ends[0]}"))
        return ends

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(os, "pipe", pipe)
    monkeypatch.setattr(threading.Thread, "start", start)
    with anyio.fail_after(GUARD), pytest.raises(HostError, match="no thread can be started"):
        await transfer()
    assert made
    assert not set(made) & set(open_files())


async def test_a_defect_of_the_work_is_no_failure_of_the_host() -> None:
    """Though Python raises the same for a thread that can't be started."""

    def take(source: Piped) -> None:
        raise RecursionError("too deep")

    with anyio.fail_after(GUARD), pytest.raises(RecursionError):
        await received(tool(), take, Path("there"))


def open_files() -> Iterator[str]:
    for one in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):       # that of the listing itself
            yield os.readlink(one)
