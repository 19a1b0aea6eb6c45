"""Sandboxes that are ready before somebody asks for one."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Self

import anyio
from attrs import define, field, frozen

from pykata.concurrency import alongside
from pykata.errors import AgentError, ConfigError, SandboxClosedError
from pykata.host import finish
from pykata.making import fresh_container
from pykata.options import check_count
from pykata.rehearsal import rehearse_in
from pykata.rootfs import prepared
from pykata.sandbox import Sandbox
from pykata.templates import Template

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds until the next attempt after a start that failed and that nobody was waiting for."""


@frozen
class PoolStats:
    """What a pool has and has done."""

    ready: int
    """Sandboxes that wait for somebody."""
    in_use: int
    """Sandboxes that were given away, and aren't back."""
    waiting: int
    """Tasks that wait for a sandbox."""
    started: int
    """Sandboxes that were started, ever."""
    failed: int
    """Starts that failed."""
    died: int
    """Sandboxes that ended while they were waiting for somebody."""


CHECKED_EVERY = 10.0
"""Seconds after which one that nobody has is asked whether it still answers."""

ANSWERS_WITHIN = 10.0
"""Seconds that it may take for that; meanwhile nobody gets it."""


@define(eq=False)
class _Ready:
    sandbox: Sandbox
    watch: anyio.CancelScope = field(factory=anyio.CancelScope)
    is_watched: bool = False
    is_asked: bool = False      # whether it still answers

    @property
    def is_alive(self) -> bool:
        running = self.sandbox._open
        return not running.vm.has_ended and not running.agent.is_lost


class Pool:
    """Sandboxes of a template, some of which are always ready.

    ::

        async with Template("./images/app") as template, Pool(template, size=4) as pool:
            async with pool.acquire() as sb:
                done = await sb.run("./images/app", ["handle"])

    ``size`` are kept ready; one that was taken is replaced in the background. There are never more than ``limit``
    altogether, with those in use (default: no limit). Who waits is served in the order of coming. One that ends while
    nobody has it is replaced, as is one that doesn't answer any more. Each is used once: when it is given back it is
    gone.

    Where there is no KVM, what has run in a guest once runs much faster the next time. So each has rehearsed the way of
    a command, without one of the image's. For more, ``warm_up`` is called with each new one before anybody gets it. If
    it has used the container that waits in a sandbox of the template for its first ``run``, there is a new one
    afterwards. What it raises is a start that failed.
    """

    def __init__(
        self, template: Template, size: int = 2, *, limit: int | None = None,
        warm_up: Callable[[Sandbox], Awaitable[object]] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(template, Template):
            raise ConfigError(f"template={template!r} is not a Template", hint="pass a Template that is open")
        if warm_up is not None and not callable(warm_up):
            raise ConfigError(f"warm_up={warm_up!r} is not a function", hint="give an async function of a Sandbox")
        self._template = template
        self._warm_up = warm_up
        self._size = check_count("size", size)
        self._limit = None if limit is None else check_count("limit", limit)
        if self._limit is not None and self._limit < self._size:
            raise ConfigError(f"limit={limit} is less than size={size}")
        self._stack = AsyncExitStack()
        self._ready: deque[_Ready] = deque()
        self._waiting: deque[asyncio.Future[Sandbox]] = deque()
        self._is_open = False
        self._changed = asyncio.Event()
        self._arrived = asyncio.Event()
        self._starting = self._in_use = self._started = self._failed = self._died = 0

    async def __aenter__(self) -> Self:
        if self._is_open:
            raise SandboxClosedError("this pool is entered already", hint="make a Pool for each block")
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._drain)
            await stack.enter_async_context(alongside(self._fill()))
            self._stack = stack.pop_all()
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        await self._stack.__aexit__(kind, error, trace)

    @property
    def stats(self) -> PoolStats:
        """What it has now, and has done."""
        return PoolStats(
            ready=len(self._ready), in_use=self._in_use, waiting=len(self._waiting), started=self._started,
            failed=self._failed, died=self._died,
        )  # fmt: skip

    async def filled(self) -> None:
        """Wait until as many are ready as shall be. Raises SandboxClosedError where the pool isn't open."""
        self._check_open()
        while len(self._ready) < self._size:
            self._arrived.clear()
            await self._arrived.wait()
            self._check_open()

    def _check_open(self) -> None:
        if not self._is_open:
            raise SandboxClosedError("this pool is not open", hint="use it inside its 'async with' block")

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Sandbox]:
        """A sandbox that nobody else has had; gone when the block is left.

        Waits if none is ready. Raises why the one that was started for it couldn't be.
        """
        sandbox = await self._take()
        try:
            yield sandbox
        finally:
            try:
                await finish(sandbox.__aexit__(None, None, None))
            finally:
                self._in_use -= 1
                self._changed.set()

    async def _take(self) -> Sandbox:
        self._check_open()
        self._changed.set()
        # One that has just died is left to who watches it.
        if (ready := next((one for one in self._ready if one.is_alive and not one.is_asked), None)) is not None:
            self._ready.remove(ready)
            self._in_use += 1
            ready.watch.cancel()
            return ready.sandbox
        turn: asyncio.Future[Sandbox] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._in_use -= 1
                self._pass_on(turn.result())        # it came as we were leaving
            raise
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    def _pass_on(self, sandbox: Sandbox) -> None:
        """Give it to who has waited longest; without one it is ready for the next."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_use += 1       # by now: who has waited only runs later, and others are started meanwhile
                turn.set_result(sandbox)
                return
        self._ready.appendleft(_Ready(sandbox))
        self._arrived.set()
        self._changed.set()

    # --- in the background ---

    async def _fill(self) -> None:
        """Start what is missing, as many at a time as there are cores, until the pool is left."""
        cores = len(os.sched_getaffinity(0))
        async with anyio.create_task_group() as group:
            while True:
                self._changed.clear()
                for ready in self._ready:
                    if not ready.is_watched:
                        ready.is_watched = True
                        group.start_soon(self._watch, ready)
                while self._starting < min(self._missing(), cores):
                    self._starting += 1
                    group.start_soon(self._start)
                await self._changed.wait()

    def _missing(self) -> int:
        """How many have to be started, those that are being started included."""
        wanted = self._size - len(self._ready) + len(self._waiting)
        if self._limit is None:
            return wanted
        return min(wanted, self._limit - len(self._ready) - self._in_use)

    async def _start(self) -> None:
        try:
            try:
                sandbox = await self._warm()
            except Exception as error:      # whatever the caller's own function raises, too
                self._failed += 1
                await self._tell(error)
                return
            self._started += 1
            self._pass_on(sandbox)
        finally:
            self._starting -= 1
            self._changed.set()

    async def _warm(self) -> Sandbox:
        async with AsyncExitStack() as stack:
            sandbox = await stack.enter_async_context(self._template.sandbox())
            await rehearse_in(sandbox._open)
            if self._warm_up is not None:
                await self._have_waiting(sandbox, 2)    # by now: while an image is in use, what was read of it stays
                await self._warm_up(sandbox)
                await sandbox._open.settled()
                await self._have_waiting(sandbox, 1)
            stack.pop_all()         # from here on it is whoever's it becomes
            return sandbox

    async def _have_waiting(self, sandbox: Sandbox, count: int) -> None:
        """So many containers of the template's image that nothing has run in."""
        running = sandbox._open
        for _ in range(count - sum(one.fresh for one in running.containers.values())):
            rootfs = await sandbox._stack.enter_async_context(prepared(running, self._template.image))
            await sandbox._stack.enter_async_context(fresh_container(running, rootfs))

    async def _tell(self, error: Exception) -> None:
        """A start failed: who has waited longest is told. If nobody waits, the next attempt does."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(error)
                return
        log.warning("a sandbox of the pool didn't start: %s", error)
        await anyio.sleep(PATIENCE)

    async def _watch(self, ready: _Ready) -> None:
        """See to it that one that ends is replaced, rather than given to somebody."""
        with ready.watch:
            while not await self._is_lost(ready):
                if self._waiting:           # they came while it was asked
                    self._ready.remove(ready)
                    self._pass_on(ready.sandbox)
                    return
            self._ready.remove(ready)
            self._died += 1
            await finish(ready.sandbox.__aexit__(None, None, None))
            self._changed.set()

    async def _is_lost(self, ready: _Ready) -> bool:
        """Wait until it is time to ask it; whether it has ended by then, or doesn't answer."""
        from pykata.agent.v1 import CloneRequest

        running = ready.sandbox._open
        with anyio.move_on_after(CHECKED_EVERY):
            await running.agent.lost()      # ends with the machine, too
            return True
        ready.is_asked = True
        try:
            # What sets its clock, and is the one call that doesn't need HTTP/2, with which its first command begins.
            await running.agent.clone(CloneRequest(), timeout=ANSWERS_WITHIN)
            return False
        except AgentError as error:
            running.broken = running.broken or error        # nothing is asked of it as it is left
            return True
        finally:
            ready.is_asked = False

    async def _drain(self) -> None:
        """The end: nothing is started any more."""
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(SandboxClosedError("the pool was left while this waited for a sandbox"))
        self._waiting.clear()
        self._arrived.set()
        async with AsyncExitStack() as stack:
            while self._ready:
                stack.push_async_exit(self._ready.pop().sandbox)
