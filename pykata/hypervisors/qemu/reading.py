"""Reading the memory of another process (process_vm_readv(2)), which Python has no function for.

``/proc/PID/mem`` would do the same by way of a page of the kernel's, and so takes twice as long.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

AT_ONCE = 512               # pieces in one call; Linux takes 1024 (UIO_MAXIOV)


class _Piece(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_readv.restype = ctypes.c_ssize_t
_readv.argtypes = (
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
)  # fmt: skip


def copy_in(target: mmap.mmap, pid: int, at: int, pieces: Sequence[tuple[int, int]]) -> None:
    """Copy pieces (start and end) of what process ``pid`` has at ``at`` to the same places of ``target``.

    Other threads run meanwhile. Raises OSError.
    """
    held = ctypes.c_char.from_buffer(target)
    try:
        here = ctypes.addressof(held)
        left = list(pieces)
        while left:
            ours, theirs = ((_Piece * len(left))(*(_Piece(base + start, end - start) for start, end in left))
                            for base in (here, at))
            count = _readv(pid, ours, len(left), theirs, len(left), 0)
            if count <= 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            left = _rest(left, count)
    finally:
        del held        # or the mapping couldn't be closed


def _rest(pieces: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """What is left of them after so many bytes."""
    left = []
    for start, end in pieces:
        done = min(count, end - start)
        count -= done
        if start + done < end:
            left.append((start + done, end))
    return left
