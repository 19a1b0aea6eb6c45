"""The machine of a fork's first child, which is started before it is known what the child's devices are like.

To start QEMU takes longer than to save a guest, and needs nothing of it but the file that its memory will be in, and
the disks. What the devices were like comes last, over a socket for which QEMU waits.

For the first fork of a sandbox it is started while the guest is being saved. Who has forked once may fork again: so the
machine of the next fork is started when a child of the last one has had its start, and waits (:class:`NextFork`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Self

import anyio
from attrs import evolve, frozen

from pykata.admission import RESTORED, admitted_now
from pykata.boot import Machine, attached
from pykata.concurrency import alongside
from pykata.errors import PykataError
from pykata.guest import Bundle
from pykata.host import finish
from pykata.hypervisors.base import VM, Coming
from pykata.options import Options
from pykata.origin import NOBODY
from pykata.spares import Ready, Spare
from pykata.spec import MIB, SavedVM

log = logging.getLogger(__name__)

ROOM = 512 * 1024
"""Bytes of devices that nobody has to wait for QEMU to read; there are some 340 KB of them (socket(7))."""
MOST = 256 * MIB
"""Bytes of what a sandbox was started from, above which no machine waits for its next fork: they are copied for that,
which others' starts wait for, and kept."""


class Ahead:
    """A machine for a guest with these options. If it can't be started, or has to wait for its turn, there is none."""

    def __init__(self, options: Options, bundle: Bundle) -> None:
        self._options = evolve(options, hostname=NOBODY, env={}, spares=None)
        self._bundle = bundle       # of the guest that is saved, whatever would be found by now
        self._spare: Spare | None = None
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
        self._has_turn = False
        self._saved: SavedVM | None = None
        self._is_saved = anyio.Event()
        self._goes_on = False
        self._settled = anyio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """The end of it, if it is nobody's. May be called again."""
        self._ours.close()
        self._theirs.close()
        spare, self._spare = self._spare, None
        if spare is not None:
            await finish(spare.stack.aclose())

    async def start(self, coming: SavedVM) -> Machine:
        """Start it, as it is one's turn to. ``coming`` has no devices yet, nor all of its memory."""
        self._has_turn = True
        waiting = evolve(coming, stream=self._theirs)
        async with AsyncExitStack() as stack:
            machine = await attached(stack, self._options, waiting, bundle=self._bundle, paused=True)
            vm = await stack.enter_async_context(self._options.hypervisor.boot(machine.spec, machine.directory))
            self._spare = Spare(evolve(machine, vm=vm), stack.pop_all())
        self._theirs.close()        # QEMU has its own
        return self._spare.machine

    @asynccontextmanager
    async def starting(self, coming: SavedVM) -> AsyncIterator[None]:
        """Start it while the block runs, unless it waits already. It goes on when the block has it :meth:`complete`."""
        async with alongside(self._go_on(coming)):
            yield
            if self._has_turn:
                await self._settled.wait()

    def complete(self, saved: SavedVM) -> None:
        """Give it what it waits for; it goes on from there as soon as it is resumed."""
        self._saved = saved
        self._is_saved.set()

    def take(self) -> Spare | None:
        """The machine, if there is one that goes on. It is the caller's from now on."""
        if not self._goes_on:
            return None
        spare, self._spare = self._spare, None
        return spare

    async def _go_on(self, coming: SavedVM) -> None:
        try:
            if self._spare is None:
                await self._started(coming)
            await self._is_saved.wait()
            if self._spare is not None and self._saved is not None and self._saved.slots == coming.slots:
                self._goes_on = await self._told(self._saved.devices)
        except (PykataError, OSError) as error:     # each child starts its own all the same, and says what is wrong
            log.debug("no machine was started ahead: %s", error)
        finally:
            self._settled.set()

    async def _started(self, coming: SavedVM) -> None:
        async with admitted_now(RESTORED) as fits:
            if fits:
                await self.start(coming)

    async def _told(self, devices: bytes) -> bool:
        with anyio.move_on_after(self._options.boot_timeout) as patience:
            await asyncio.get_running_loop().sock_sendall(self._ours, devices)
        self._ours.close()
        return not patience.cancelled_caught


@frozen
class Waiting(Spare):
    """A machine that waits for its devices, and what was begun of saving those."""

    coming: Coming
    ahead: Ahead

    @property
    def is_good(self) -> bool:
        """Nor can one that has other disks: it would keep the fork from starting its own."""
        return super().is_good and self.coming.is_current


class NextFork(Ready[Waiting]):
    """The machine of the next fork of a sandbox, where there is memory for one: it takes some 15 MiB, and as much again
    as the sandbox was started from."""

    def __init__(self, vm: VM, options: Options, bundle: Bundle) -> None:
        super().__init__(0)
        self._vm = vm
        self._options = options
        self._bundle = bundle

    def want(self) -> None:
        """One is to be started, now that nobody needs the processors."""
        if self._vm.started_from <= MOST:
            self._count = 1
            self.refill()

    def take(self) -> Waiting | None:
        """The one there is. It is the caller's from now on, who leaves its stack; there is no other before the next is
        wanted."""
        self._count = 0
        self._wanted.set()      # one that was no good is removed now, and none is started
        return self._next()

    @property
    def _cost(self) -> int:
        return RESTORED + self._vm.started_from

    async def _started(self) -> Waiting:
        async with AsyncExitStack() as stack:
            coming = await stack.enter_async_context(self._vm.coming())
            ahead = await stack.enter_async_context(Ahead(self._options, self._bundle))
            await coming.begin()
            machine = await ahead.start(coming.vm)
            return Waiting(machine, stack.pop_all(), coming, ahead)
