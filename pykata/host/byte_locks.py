"""Locks on a byte of an open file (fcntl(2), "Open file description locks").

Such a lock belongs to the open file description: a process that inherits the descriptor has it too, and the kernel
frees it with the last copy, however its holders end. Unlike with flock(2), one can ask who is locked without locking.
"""

from __future__ import annotations

import fcntl
import os
import struct

_FLOCK = struct.Struct("hhqqi4x")       # l_type, l_whence, l_start, l_len, l_pid


def lock_byte(descriptor: int, byte: int = 0, *, shared: bool = False) -> bool:
    """Lock a byte of the file, or say that someone else has; several can share a lock."""
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except (BlockingIOError, PermissionError):      # EAGAIN or EACCES: fcntl(2)
        return False
    return True


def byte_is_locked(descriptor: int, byte: int = 0, *, length: int = 1) -> bool:
    """Has someone else locked the byte, or one of so many; 0 is all that follow? Nobody notices the question."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, length, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
