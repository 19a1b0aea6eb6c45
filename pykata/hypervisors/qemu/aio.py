"""How QEMU waits for its disks: by io_uring where that works, else with a pool of threads.

What a guest waits for is mostly in the host's memory. A thread has to be woken for each request, and has to wake QEMU;
io_uring answers such a request at once: a guest reads small files twice as fast (``benchmarks/fs.py``).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from pathlib import Path
from typing import Literal

from pykata.hypervisors.qemu import version

Aio = Literal["io_uring", "threads"]

DISABLED = Path("/proc/sys/kernel/io_uring_disabled")       # Linux 6.6 and later
_SYS_IO_URING_SETUP = 425       # the same on every architecture
_PARAMS = 120                   # bytes of struct io_uring_params
_FEATURES = 20                  # offset of its field "features"
# Since Linux 5.12. Before it, the rings of all of a user's machines counted against what it may lock into memory.
_FEAT_NATIVE_WORKERS = 1 << 9


def choose(binary: Path) -> Aio:
    """What this QEMU and this kernel can."""
    program = version.program(binary)
    found = program.stat()
    return "io_uring" if _kernel_has_it() and _is_linked(program, found.st_size, found.st_mtime_ns) else "threads"


@functools.lru_cache(maxsize=8)
def _is_linked(binary: Path, size: int, changed: int) -> bool:
    """Whether QEMU was built with it. Asking it would take a process of its own."""
    with binary.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        return mapped.find(b"liburing.so") >= 0


@functools.cache
def _kernel_has_it() -> bool:
    """Whether a ring can be made, by whatever user QEMU runs as. Containers often forbid it."""
    try:
        if DISABLED.read_text().strip() != "0":
            return False
    except OSError:
        pass                    # an older kernel, which has no such switch
    params = ctypes.create_string_buffer(_PARAMS)
    descriptor = ctypes.CDLL(None).syscall(_SYS_IO_URING_SETUP, 1, params)
    if descriptor < 0:
        return False
    os.close(descriptor)
    return bool(int.from_bytes(params.raw[_FEATURES : _FEATURES + 4], "little") & _FEAT_NATIVE_WORKERS)
