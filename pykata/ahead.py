"""The machine of a fork's first child, which is started while the guest is being saved that it will go on with.

To start QEMU takes about as long as to save a guest, and needs nothing of it but the file that its memory will be in,
and the disks. What the devices were like comes last, over a socket for which QEMU waits.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Self

import anyio
from attrs import evolve

from pykata.admission import RESTORED, admitted_now
from pykata.boot import attached
from pykata.concurrency import alongside
from pykata.errors import PykataError
from pykata.guest import Bundle
from pykata.host import finish
from pykata.options import Options
from pykata.origin import NOBODY
from pykata.spares import Spare
from pykata.spec import SavedVM

log = logging.getLogger(__name__)


class Ahead:
    """A machine for a guest with these options. If it can't be started, or has to wait for its turn, there is none."""

    def __init__(self, options: Options, bundle: Bundle) -> None:
        self._options = evolve(options, hostname=NOBODY, env={}, spares=None)
        self._bundle = bundle       # of the guest that is saved, whatever would be found by now
        self._spare: Spare | None = None
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._has_turn = False
        self._settled = anyio.Event()

    @asynccontextmanager
    async def starting(self, coming: SavedVM) -> AsyncIterator[None]:
        """Start it while the block runs. ``coming`` has no devices yet, nor all of its memory."""
        async with alongside(self._start(evolve(coming, stream=self._theirs))):
            yield
            if self._has_turn:
                await self._settled.wait()

    async def complete(self, saved: SavedVM) -> Spare | None:
        """Give it what it waits for; it goes on from there as soon as it is resumed. It is the caller's from now on."""
        if self._spare is None:
            return None
        try:
            with anyio.move_on_after(self._options.boot_timeout) as patience:
                await asyncio.get_running_loop().sock_sendall(self._ours, saved.devices)
        except OSError as error:        # its QEMU has ended
            log.debug("no machine was started ahead: %s", error)
            return None
        if patience.cancelled_caught:
            log.debug("the machine that was started ahead takes nothing")
            return None
        spare, self._spare = self._spare, None
        return spare

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """The end of it, if it is nobody's."""
        self._ours.close()
        self._theirs.close()
        if self._spare is not None:
            await finish(self._spare.stack.aclose())

    async def _start(self, coming: SavedVM) -> None:
        try:
            async with admitted_now(RESTORED) as fits, AsyncExitStack() as stack:
                if fits:
                    self._has_turn = True
                    machine = await attached(stack, self._options, coming, bundle=self._bundle, paused=True)
                    boot = self._options.hypervisor.boot(machine.spec, machine.directory)
                    vm = await stack.enter_async_context(boot)
                    self._spare = Spare(evolve(machine, vm=vm), stack.pop_all())
        except (PykataError, OSError) as error:     # each child starts its own all the same, and says what is wrong
            log.debug("no machine was started ahead: %s", error)
        finally:
            self._theirs.close()        # QEMU has its own
            self._settled.set()
