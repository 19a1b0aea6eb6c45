"""Numbers that sandboxes of all processes share out among themselves: who has one holds a lock on a byte of a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pykata.errors import AddressesExhaustedError
from pykata.host import byte_is_locked, lock_byte


@contextmanager
def lease(file: Path, numbers: Iterable[int], *, what: str) -> Iterator[int]:
    """The first of the numbers that nobody has. The kernel gives it back when we end, however that happens.

    Raises AddressesExhaustedError.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for number in numbers:
            if lock_byte(descriptor, number):
                break
        else:
            raise AddressesExhaustedError(f"every address of {what} is taken", hint="a larger network has more")
        yield number
    finally:
        os.close(descriptor)


def held(file: Path, number: int | None = None) -> bool:
    """Does someone hold the number, or any?"""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return byte_is_locked(descriptor, number or 0, length=0 if number is None else 1)
    finally:
        os.close(descriptor)


def forget_unused(file: Path) -> None:
    """Remove the file if nobody holds any number of it. Whoever may take one meanwhile has to be kept out."""
    if not held(file):
        file.unlink(missing_ok=True)
