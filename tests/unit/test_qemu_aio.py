"""How QEMU waits for its disks is what it and the kernel can both do."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from pykata.hypervisors.qemu import aio


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    path = tmp_path / "qemu"
    path.write_bytes(b"\x7fELF" + bytes(5000) + b"liburing.so.2\0" + bytes(10))
    return path


class Kernel:
    """Answers io_uring_setup(2)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: int, features: int) -> None:
        self.closed: list[int] = []
        self.answer, self.features = answer, features
        monkeypatch.setattr(ctypes, "CDLL", lambda name: self)
        monkeypatch.setattr("os.close", self.closed.append)

    def syscall(self, number: int, entries: int, params: ctypes.Array[ctypes.c_char]) -> int:
        assert (number, entries, len(params)) == (425, 1, 120)
        ctypes.memmove(ctypes.addressof(params) + 20, self.features.to_bytes(4, "little"), 4)
        return self.answer


@pytest.fixture(autouse=True)
def asks_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(aio, "_kernel_has_it", aio._kernel_has_it.__wrapped__)
    monkeypatch.setattr(aio, "DISABLED", tmp_path / "io_uring_disabled")


def test_where_both_have_it(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, 7, 0x3FFF)
    assert aio.choose(qemu) == "io_uring"
    assert kernel.closed == [7]
    aio.DISABLED.write_text("0\n")
    assert aio.choose(qemu) == "io_uring"


def test_a_qemu_without_it(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, 7, 0x3FFF)
    qemu.write_bytes(b"\x7fELF and nothing else")
    assert aio.choose(qemu) == "threads"


def test_a_script_has_what_the_qemu_has_that_it_starts(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, 7, 0x3FFF)
    started = qemu.rename(qemu.with_name("qemu-system-x86_64"))
    qemu.write_text(f"#!/bin/sh\nexec -a /nowhere/qemu-system-x86_64 '{started}' -L /firmware \"$@\"\n")
    assert aio.choose(qemu) == "io_uring"
    qemu.write_text("#!/bin/sh\nexec qemu-system-x86_64 \"$@\"\n")
    assert aio.choose(qemu) == "threads"        # it could be any


def test_a_kernel_that_forbids_it(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, -1, 0)
    assert aio.choose(qemu) == "threads"
    kernel.answer, kernel.features = 7, 0x3FFF
    for forbidden in ("1", "2"):        # for all but a group; for all
        aio.DISABLED.write_text(f"{forbidden}\n")
        assert aio.choose(qemu) == "threads"


def test_a_kernel_that_counts_its_rings_as_locked_memory(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, 7, 0xFF)        # Linux 5.11
    assert aio.choose(qemu) == "threads"
