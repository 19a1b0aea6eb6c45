"""What a stopped QEMU holds: the guest's memory and the state of its devices, as files of their own.

QEMU could migrate both, but would copy the whole memory of a guest whose own is mapped privately, which is each that
was started from a saved one. So the memory is read from outside, and only what differs from what the machine was
started with: Linux tells which pages those are (Documentation/admin-guide/mm/pagemap.rst). For the devices there is a
command of QEMU's that was made for Xen, whose memory isn't QEMU's own either: it writes all that a migration would but
the memory.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import anyio.to_thread

from pykata import host
from pykata.errors import HostError
from pykata.hypervisors import base
from pykata.hypervisors.qemu.qmp import QMP
from pykata.hypervisors.qemu.reading import AT_ONCE, copy_in
from pykata.spec import Disk, SavedVM

PAGE = 4096
MADV_POPULATE_WRITE = 23    # madvise(2)
FDSET = 900                 # for the file that the devices' state is written to
PIECE = 256 * 1024          # bytes that are copied as one
WORTH_IT = 64               # ... so many of them are copied by several threads: the guest stands still meanwhile
READERS = 2                 # threads; more find the memory busy
RUN = re.compile(rb"\x01+")

# By the highest byte of a page's entry: it is in memory (bit 63) or in swap (62), and not one of a file (61).
_OWN = bytes(byte & 0xC0 != 0 and byte & 0x20 == 0 for byte in range(256))


class Copy:
    """The guest's memory of the process ``pid`` on its way to ``target``, a file of its size, until this is closed.

    :meth:`begin` and :meth:`prepare` do while the guest runs what :meth:`finish` then need not do while it stands
    still: to make the pages of the file, and to map them, takes most of the time of a copy.
    """

    def __init__(self, pid: int, size: int, started_from: int | None, target: int) -> None:
        self._pid = pid
        self._size = size
        self._started_from = started_from
        """The file that the guest's memory is a private mapping of, if it is; closed with this."""
        self._target = target
        self._has_begun = False
        self._mapped: mmap.mmap | None = None

    def close(self) -> None:
        """Leave what the target holds by now. May be called again."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
        if self._started_from is not None:
            os.close(self._started_from)
            self._started_from = None

    def begin(self) -> None:
        """Copy what the machine was started from, if that isn't there yet."""
        if self._started_from is not None and not self._has_begun:
            host.copy_file(self._started_from, self._target)
        self._has_begun = True

    def prepare(self) -> None:
        """Make room for what the guest has written since."""
        self.begin()
        mapped = self._open()
        with self._explained():
            for start, end in _own_pages(self._pid, self._address(), self._size):
                with suppress(OSError):     # a kernel before 5.14
                    mapped.madvise(MADV_POPULATE_WRITE, start, end - start)

    def finish(self) -> None:
        """Copy the pages that are the guest's own. It must stand still."""
        at = self._address()
        with self._explained():
            pieces = list(_pieces(_own_pages(self._pid, at, self._size)))
            share = -(-len(pieces) // READERS)
            parts = [pieces[first : first + share] for first in range(0, len(pieces), share or 1)]
            if len(pieces) < WORTH_IT:
                self._read(at, pieces)
            else:
                with ThreadPoolExecutor(READERS) as readers:
                    list(readers.map(partial(self._read, at), parts))

    def _read(self, at: int, pieces: list[tuple[int, int]]) -> None:
        for first in range(0, len(pieces), AT_ONCE):
            copy_in(self._open(), self._pid, at, pieces[first : first + AT_ONCE])

    def _open(self) -> mmap.mmap:
        if self._mapped is None:
            self._mapped = mmap.mmap(self._target, self._size)
        return self._mapped

    def _address(self) -> int:
        return _guest_memory(self._pid, self._size, self._started_from)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            hint = "saving a virtual machine takes the right to trace a process of one's own"
            raise HostError(f"can't read the memory of QEMU (process {self._pid}): {exc.strerror}",
                            hint=hint if exc.errno in (errno.EACCES, errno.EPERM) else "") from exc


def _pieces(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same, none longer than :data:`PIECE`."""
    for start, end in runs:
        for first in range(start, end, PIECE):
            yield first, min(first + PIECE, end)


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


class Coming(base.Coming):
    """A machine of QEMU's that will be saved."""

    def __init__(self, vm: SavedVM, copy: Copy, disks: Callable[[], Mapping[int, Disk]]) -> None:
        self.vm = vm
        self.copy = copy
        self._disks = disks
        self._is_prepared = False

    @property
    def is_current(self) -> bool:
        return self.vm.slots == self._disks()

    async def begin(self) -> None:
        await _to_the_end(self.copy.begin)

    async def prepare(self) -> None:
        if not self._is_prepared:
            await _to_the_end(self.copy.prepare)
            self._is_prepared = True

    async def finish(self) -> None:
        """Copy what is left. It must stand still."""
        await _to_the_end(self.copy.finish)


async def _to_the_end(work: Callable[[], None]) -> None:
    """In a thread, which can't be stopped, and uses what would be closed afterwards."""
    await host.finish(anyio.to_thread.run_sync(work))


class Incoming:
    """The state of devices on its way into a QEMU that starts, which gets the socket ``theirs``.

    Not a file, because QEMU 11 takes none by a descriptor, and older ones have no other way to take one.
    """

    def __init__(self, devices: bytes) -> None:
        self._devices = devices
        self._ours, self.theirs = socket.socketpair()
        self._ours.setblocking(False)
        # Some 340 KB: more than fits by default, and with what Linux allows nobody waits for QEMU to read (socket(7)).
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(devices))

    async def send(self) -> None:
        """Send it all. Most fits into the socket at once; the rest goes as QEMU reads."""
        self.theirs.close()         # QEMU has its own by now, and if that is closed there is nobody to read
        with suppress(OSError):     # it has ended, of which it is known elsewhere why
            await asyncio.get_running_loop().sock_sendall(self._ours, self._devices)
        self._ours.close()

    def close(self) -> None:
        self._ours.close()
        self.theirs.close()


async def devices(qmp: QMP) -> bytes:
    """The state of all devices of a machine that stands still."""
    with host.memory_file(0) as written:
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
