"""Disk slots: disks that come and go while the machine runs, on a machine without hotplug.

The guest boots with a few virtio-blk devices over nothing (QEMU's ``null-co``), named by their serials. Plugging
exchanges the node behind one of them (1 to 2 ms). The guest isn't told: Linux drops a block device's cache when it is
closed for the last time, so who mounts the device next reads the new content. Its size stays
:data:`~.command.EMPTY_SIZE`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from attrs import define, evolve, field

from pykata.errors import ConfigError, HostError, VMError
from pykata.host import finish
from pykata.hypervisors.qemu.aio import Aio
from pykata.hypervisors.qemu.command import empty_name, image_node, node_name, slot_name
from pykata.hypervisors.qemu.qmp import QMP, QMPClosedError
from pykata.spec import Disk, DiskFormat, LentSlot, place_of

log = logging.getLogger(__name__)

BLOCK = 4096            # bytes; the guest reads whole pages, and gets an error for one that the image ends in
PATIENCE = 120.0        # seconds; who holds the slots may be the very task that waits
FIRST_FDSET = 1000      # above those of the disks that the machine was started with

Key = tuple[int, int, DiskFormat]


@define(eq=False)
class Plugged:
    """An image in a slot: once, for all its users. ``inserting`` is done when the guest can read it."""

    number: int
    disk: Disk
    inserting: asyncio.Future[None]
    users: int = 0


@define(eq=False)
class Loan:
    """A slot that somebody has as long as nobody else needs it."""

    recall: Callable[[], None]
    over: asyncio.Event = field(factory=asyncio.Event)


class Slots:
    """The slots of one machine. Who waits for one is served in the order of coming.

    ``started_with`` are the disks that it has in slots from its start on, and keeps: by number.
    """

    def __init__(self, qmp: QMP, count: int, started_with: Mapping[int, Disk], aio: Aio = "threads") -> None:
        self._qmp = qmp
        self._count = count
        self._aio = aio
        self._free = [number for number in reversed(range(count)) if number not in started_with]
        self._plugged = {
            _key(os.stat(disk.path), disk): _kept(number, disk) for number, disk in started_with.items()
        }
        self._exchange = asyncio.Lock()
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._next_fdset = FIRST_FDSET
        self._loan: Loan | None = None
        self._standing_still = 0
        self._lost = 0          # slots that nobody gets any more
        self._gone = False
        qmp.on_close = self._give_up

    @asynccontextmanager
    async def plug(self, disk: Disk) -> AsyncIterator[str]:
        """``disk`` in a slot; yields the slot's serial. An image that is in a slot already is shared."""
        descriptor = _open(disk)
        try:
            key = _key(os.fstat(descriptor), disk)
            plugged = self._plugged.get(key)
            if plugged is None:
                number = await self._take()
                plugged = self._join(key, number, descriptor, disk)
            plugged.users += 1
            try:
                await asyncio.shield(plugged.inserting)
                os.close(descriptor)
                descriptor = -1
                yield slot_name(plugged.number)
            finally:
                plugged.users -= 1
                if not plugged.users:
                    await finish(self._eject(key, plugged))
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[dict[int, Disk]]:
        """No disk comes or goes while the block runs; yields those that are there, by the number of their slot."""
        self._standing_still += 1
        try:
            if self._loan is not None:
                self._loan.recall()
                await self._loan.over.wait()
            async with self._exchange:
                yield self.now()
        finally:
            self._standing_still -= 1

    def now(self) -> dict[int, Disk]:
        """The disks that are there, by the number of their slot."""
        return {plugged.number: plugged.disk for plugged in self._plugged.values() if _is_in(plugged)}

    @asynccontextmanager
    async def lend(self, memory: int, recall: Callable[[], None]) -> AsyncIterator[LentSlot | None]:
        """A free slot with a memory file in it, for one at a time; None if there is none. See :meth:`VM.lend`."""
        if self._gone or self._loan or self._waiting or self._standing_still or not self._free:
            yield None
            return
        disk = Disk("staging", Path(f"/proc/self/fd/{memory}"), descriptor=memory)
        descriptor = _open(disk)
        number = self._free.pop()
        plugged = Plugged(number, disk, asyncio.ensure_future(self._insert(number, descriptor, disk)))
        loan = self._loan = Loan(recall)
        slot = LentSlot(slot_name(number))
        try:
            await asyncio.shield(plugged.inserting)
            yield slot
        finally:
            try:
                if slot.is_lost:
                    self._lost += 1
                else:
                    await finish(self._eject(None, plugged))
            finally:
                self._loan = None
                loan.over.set()

    async def _take(self) -> int:
        """The number of a slot that is ours now."""
        if self._gone:
            raise QMPClosedError("the virtual machine has ended, so nothing can be plugged into it")
        if self._free:
            return self._free.pop()
        if not self._count:
            raise ConfigError("this machine has no disk slot for an image", hint="QEMU(disk_slots=...) above 0")
        if self._loan is not None:
            self._loan.recall()
        log.info("waiting for a disk slot: all %d are taken by other images", self._count)
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(PATIENCE):
                return await turn
        except (asyncio.CancelledError, TimeoutError) as exc:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give_back(turn.result())
            if isinstance(exc, TimeoutError):
                lost = f" ({self._lost} of them lost: the guest may still read them)" if self._lost else ""
                raise HostError(
                    f"all {self._count} disk slots of this machine{lost} have been taken for {PATIENCE:g} s",
                    hint="leave a container of another image, or use QEMU(machine='q35', disk_slots=...)",
                ) from exc
            raise
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    def _give_back(self, number: int) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                return turn.set_result(number)
        return self._free.append(number)

    def _join(self, key: Key, number: int, descriptor: int, disk: Disk) -> Plugged:
        """Put the image into slot ``number``, unless someone else did while we waited for a slot."""
        if (plugged := self._plugged.get(key)) is not None:
            self._give_back(number)
            return plugged
        inserting = asyncio.ensure_future(self._insert(number, os.dup(descriptor), disk))
        # Without its descriptor, which isn't ours: a machine that is saved has it by its path.
        self._plugged[key] = plugged = Plugged(number, evolve(disk, descriptor=None), inserting)
        return plugged

    async def _insert(self, number: int, descriptor: int, disk: Disk) -> None:
        self._next_fdset = fdset = self._next_fdset + 1
        name = node_name(number)
        try:
            await self._qmp.execute("add-fd", {"fdset-id": fdset}, fd=descriptor)
        finally:
            os.close(descriptor)
        try:
            await self._qmp.execute("blockdev-add", image_node(name, fdset, disk, self._aio))
        finally:
            # The node has its own duplicate; QEMU forgets the set when that is closed.
            await self._qmp.execute("remove-fd", {"fdset-id": fdset})
        try:
            await self._switch(number, name)
        except VMError:
            await self._qmp.execute("blockdev-del", {"node-name": name})
            raise

    async def _eject(self, key: Key | None, plugged: Plugged) -> None:
        if key is not None and self._plugged.get(key) is plugged:
            del self._plugged[key]
        try:
            await plugged.inserting
        except VMError:
            return self._give_back(plugged.number)
        try:
            await self._switch(plugged.number, empty_name(plugged.number))
            await self._qmp.execute("blockdev-del", {"node-name": node_name(plugged.number)})
        except QMPClosedError:
            log.debug("slot %d went with its machine", plugged.number)
        except VMError as exc:      # not given back: nobody knows what is in it
            self._lost += 1
            log.warning("disk slot %d is lost: %s", plugged.number, exc)
        else:
            self._give_back(plugged.number)
        return None

    async def _switch(self, number: int, node: str) -> None:
        """Set what is behind a slot's device. QEMU waits for the requests under way, then exchanges the node."""
        target = {"path": f"/machine/peripheral/{slot_name(number)}", "property": "drive", "value": node}
        async with self._exchange:
            await self._qmp.execute("qom-set", target)

    def _give_up(self) -> None:
        """The machine is gone: so is what they wait for."""
        self._gone = True
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(QMPClosedError("the virtual machine ended while this waited for a disk slot"))
        self._waiting.clear()


def _key(found: os.stat_result, disk: Disk) -> Key:
    return found.st_dev, found.st_ino, disk.format


def _kept(number: int, disk: Disk) -> Plugged:
    """A disk that stays: who uses it next isn't its last user."""
    inserted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    inserted.set_result(None)
    return Plugged(number, disk, inserted, users=1)


def _is_in(plugged: Plugged) -> bool:
    return plugged.inserting.done() and not plugged.inserting.cancelled() and plugged.inserting.exception() is None


def _open(disk: Disk) -> int:
    if not disk.readonly:
        raise ConfigError(f"disk {disk.tag!r} is writable, and a running machine takes read-only ones",
                          hint="give it to the machine at start, among its devices")
    try:
        descriptor = os.open(place_of(disk), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise HostError(f"can't open the disk {disk.path}: {exc.strerror}") from exc
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        size = os.lseek(descriptor, 0, os.SEEK_END) if disk.is_device else os.fstat(descriptor).st_size
        if disk.format == "raw" and (size == 0 or size % BLOCK):
            raise ConfigError(f"{disk.path} has {size} bytes, no multiple of {BLOCK}", hint="pad it with zeros")
        stack.pop_all()
    return descriptor
