"""Machines that go on from a template before somebody asks for a sandbox.

Most of a start is the same for each: QEMU is started and loads the saved machine, the agent takes its first request,
for which all of its code has to be translated. So a template keeps some machines that have got as far as that, and
have rehearsed what comes next. Who enters a sandbox makes another guest of one, as of each that goes on from a
template.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Generic, Self, TypeVar

import anyio
from attrs import evolve, frozen

from pykata.admission import RESTORED, admitted_now, giving
from pykata.boot import Machine, attached
from pykata.concurrency import alongside
from pykata.errors import PykataError, VMDiedError
from pykata.host import finish
from pykata.net.none import NoNetwork
from pykata.options import Options
from pykata.origin import NOBODY, Origin
from pykata.rehearsal import rehearse
from pykata.restore import taken_over
from pykata.spec import SavedVM

log = logging.getLogger(__name__)

AGAIN = 5.0
"""Seconds after which one that is waited for is tried again, where that failed."""
PATIENCE = 1.0
"""Seconds after which one that was taken is replaced, if the sandbox has had no output by then."""


@frozen
class Spare:
    """A machine that nobody has. All that belongs to it goes with its ``stack``."""

    machine: Machine
    stack: AsyncExitStack

    @property
    def is_good(self) -> bool:
        """Whether it can be somebody's; one that has just died can't."""
        vm, agent = self.machine.vm, self.machine.agent
        return vm is not None and not vm.has_ended and not (agent and agent.is_lost)


One = TypeVar("One", bound=Spare)


class Ready(Generic[One]):
    """Up to ``count`` machines that are kept ready, and how one is made."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._ready: deque[One] = deque()
        self._bad: list[One] = []
        self._is_short = False
        """One was given up for want of memory, and nobody has wanted one since."""
        self._wanted = anyio.Event()
        self._arrived = anyio.Event()

    @property
    def _cost(self) -> int:
        """Bytes that one takes."""
        return RESTORED

    async def _started(self) -> One:
        """One more. Raises PykataError and OSError where that can't be."""
        raise NotImplementedError

    def _next(self) -> One | None:
        """The next that is good. It is the caller's from now on, who leaves its stack."""
        while self._ready:
            one = self._ready.popleft()
            if one.is_good:
                return one
            self._bad.append(one)
        return None

    def refill(self) -> None:
        """Start what is missing."""
        self._is_short = False
        self._wanted.set()

    def give_up(self) -> bool:
        """End one, as somebody else's start lacks memory. Whether there was one."""
        if not self._ready:
            return False
        spare = self._ready.popleft()
        assert spare.machine.vm is not None
        spare.machine.vm.end(VMDiedError("its memory was needed"))      # now: to clean up may have to wait
        self._bad.append(spare)
        self._is_short = True
        self._wanted.set()
        return True

    async def filled(self) -> None:
        """Wait until as many are ready as shall be."""
        while len(self._ready) < self._count:
            arrived = self._arrived = self._arrived if not self._arrived.is_set() else anyio.Event()
            self.refill()       # also after a start that failed, or for want of memory
            with anyio.move_on_after(AGAIN):
                await arrived.wait()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[Self]:
        """What is missing is started as long as the block runs; what nobody has taken ends with it."""
        try:
            with giving(self.give_up):
                async with alongside(self.fill()):
                    yield self
        finally:
            await finish(self.drain())

    async def fill(self) -> None:
        """Start what is missing whenever there is a reason to, one at a time."""
        while True:
            self._wanted = anyio.Event()
            try:
                while self._bad:
                    await finish(self._bad.pop().stack.aclose())
                while not self._is_short and len(self._ready) < self._count:
                    await self._add()
            except (PykataError, OSError) as error:     # sandboxes are started all the same, and say what is wrong
                log.debug("no machine is kept ready: %s", error)
            await self._wanted.wait()

    async def drain(self) -> None:
        """The end of all that nobody has taken."""
        async with AsyncExitStack() as stack:
            for spare in (*self._ready, *self._bad):
                stack.push_async_exit(spare.stack)
            self._ready.clear()
            self._bad.clear()

    async def _add(self) -> None:
        async with admitted_now(self._cost) as fits:
            self._is_short = not fits
            if fits:
                self._ready.append(await self._started())
                self._arrived.set()


class Spares(Ready[Spare]):
    """Up to ``count`` machines that go on from ``origin``, for sandboxes with these options.

    ``then`` is called when a sandbox doesn't need the processors any more for its start.
    """

    def __init__(
        self, options: Options, origin: Origin, count: int, then: Callable[[], object] | None = None
    ) -> None:
        super().__init__(count)
        self._options = evolve(options, hostname=NOBODY, env={})
        self._origin = origin
        self._then = then

    def take(self, saved: SavedVM) -> Spare | None:
        """One that goes on from just this. It is the caller's from now on, who leaves its stack."""
        return self._next() if saved is self._origin.vm else None

    def add(self, spare: Spare) -> None:
        """One more, that goes on from just this."""
        self._ready.append(spare)

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Around a sandbox: what it took is replaced, but not while its start needs the processors."""
        later = asyncio.get_running_loop().call_later(PATIENCE, self.replace)
        try:
            yield
        finally:
            later.cancel()
            self.replace()

    def replace(self) -> None:
        """A sandbox has had its start."""
        self.refill()
        if self._then is not None:
            self._then()

    async def _started(self) -> Spare:
        options, origin = self._options, self._origin
        async with AsyncExitStack() as stack:
            # Where processes run, nothing is executed before it is known whose guest it is.
            machine = await attached(stack, options, origin.vm, bundle=origin.bundle, paused=origin.is_busy)
            vm = await stack.enter_async_context(options.hypervisor.boot(machine.spec, machine.directory))
            machine = evolve(machine, vm=vm)
            if not origin.is_busy:
                agent = await taken_over(stack, vm, machine, options, origin)
                rehearsed = await rehearse(agent, origin.rehearsal)
                machine = evolve(machine, agent=agent, rehearsed=rehearsed)
            return Spare(machine, stack.pop_all())


@asynccontextmanager
async def kept_ready(options: Options, origin: Origin, count: int) -> AsyncIterator[Spares | None]:
    """So many machines that go on from ``origin``, as long as the block runs; None if that can't be."""
    if not count or options.uses_host or options.volumes or options.network.strategy != NoNetwork():
        yield None
        return
    async with Spares(options, origin, count).kept() as spares:
        yield spares
