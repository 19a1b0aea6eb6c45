"""Reading the memory of another process."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from pykata.hypervisors.qemu.reading import _rest, copy_in

PAGE = mmap.PAGESIZE


def test_pieces_come_to_the_same_places() -> None:
    with mmap.mmap(-1, 4 * PAGE) as source, mmap.mmap(-1, 4 * PAGE) as target:
        source[:] = os.urandom(4 * PAGE)
        target[:] = old = os.urandom(4 * PAGE)
        held = ctypes.c_char.from_buffer(source)
        copy_in(target, os.getpid(), ctypes.addressof(held), [(0, PAGE), (2 * PAGE, 2 * PAGE + 5)])
        del held
        assert target[:PAGE] == source[:PAGE]
        assert target[2 * PAGE : 2 * PAGE + 5] == source[2 * PAGE : 2 * PAGE + 5]
        assert target[PAGE : 2 * PAGE] == old[PAGE : 2 * PAGE]
        assert target[2 * PAGE + 5 :] == old[2 * PAGE + 5 :]


def test_what_is_not_there_is_an_error_and_the_mapping_can_be_closed() -> None:
    with mmap.mmap(-1, PAGE) as target, pytest.raises(OSError, match="Bad address"):
        copy_in(target, os.getpid(), 0, [(0, PAGE)])


def test_what_is_left_of_pieces_after_so_many_bytes() -> None:
    assert _rest([(0, 4), (10, 14)], 0) == [(0, 4), (10, 14)]
    assert _rest([(0, 4), (10, 14)], 4) == [(10, 14)]
    assert _rest([(0, 4), (10, 14)], 6) == [(12, 14)]
    assert _rest([(0, 4), (10, 14)], 8) == []
