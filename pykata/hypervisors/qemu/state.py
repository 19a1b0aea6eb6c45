"""What a stopped QEMU holds: the guest's memory and the state of its devices, as files of their own.

QEMU could migrate both, but would copy the whole memory of a guest whose own is mapped privately, which is each that
was started from a saved one. So the memory is read from outside, and only what differs from what the machine was
started with: Linux tells which pages those are (Documentation/admin-guide/mm/pagemap.rst). For the devices there is a
command of QEMU's that was made for Xen, whose memory isn't QEMU's own either: it writes all that a migration would but
the memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pykata.errors import HostError
from pykata.host import memory_file
from pykata.hypervisors.qemu.qmp import QMP

PAGE = 4096
PIECE = 1024 * 1024         # bytes that are copied at once
FDSET = 900                 # for the file that the devices' state is written to
RUN = re.compile(rb"\x01+")

# By the highest byte of a page's entry: it is in memory (bit 63) or in swap (62), and not one of a file (61).
_OWN = bytes(byte & 0xC0 != 0 and byte & 0x20 == 0 for byte in range(256))


def copy_own_pages(pid: int, size: int, started_from: int | None, target: int) -> None:
    """Copy the guest's memory out of the process ``pid``, which must stand still: the pages that are its own.

    ``started_from`` is the file that it maps privately, if it does.
    """
    try:
        at = _guest_memory(pid, size, started_from)
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for start, end in _own_pages(pid, at, size):
                for piece in range(start, end, PIECE):
                    data = os.pread(memory.fileno(), min(PIECE, end - piece), at + piece)
                    os.pwrite(target, data, piece)
    except OSError as exc:
        raise HostError(f"can't read the memory of QEMU (process {pid}): {exc.strerror}",
                        hint="saving a virtual machine takes the right to trace a process of one's own") from exc


def _own_pages(pid: int, at: int, size: int) -> Iterator[tuple[int, int]]:
    entries = bytearray()
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        while (missing := size // PAGE * 8 - len(entries)) > 0:
            entries += os.pread(pagemap.fileno(), missing, at // PAGE * 8 + len(entries))
    for run in RUN.finditer(entries[7::8].translate(_OWN)):
        yield run.start() * PAGE, run.end() * PAGE


def _guest_memory(pid: int, size: int, started_from: int | None) -> int:
    """The address of the guest's memory in QEMU: the private mapping of just its size, of just that file."""
    inode = 0 if started_from is None else os.fstat(started_from).st_ino
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, mode, _offset, _device, of = line.split(maxsplit=5)[:5]
        first, last = (int(address, 16) for address in addresses.split("-"))
        if mode == "rw-p" and last - first == size and int(of) == inode:
            found.append(first)
    if len(found) != 1:
        raise HostError(f"can't tell where QEMU (process {pid}) has the guest's memory")
    return found[0]


async def devices(qmp: QMP) -> bytes:
    """The state of all devices of a machine that stands still."""
    with memory_file(0) as written:
        # QEMU takes a descriptor of a set only for the very mode that it wants to open the file in.
        only_writing = os.open(f"/proc/self/fd/{written}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            await qmp.execute("add-fd", {"fdset-id": FDSET}, fd=only_writing)
        finally:
            os.close(only_writing)
        try:
            await qmp.execute("xen-save-devices-state", {"filename": f"/dev/fdset/{FDSET}", "live": False})
        finally:
            await qmp.execute("remove-fd", {"fdset-id": FDSET})
        return os.pread(written, os.fstat(written).st_size, 0)
