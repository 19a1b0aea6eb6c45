"""Noticing that a process has ended that serves a virtual machine: the machine ends with it, or goes on without it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

from pykata.concurrency import alongside
from pykata.errors import AgentError, BootError, ShareLostError
from pykata.fs.helper import NO_NAMESPACE, not_permitted
from pykata.hypervisors.base import VM
from pykata.running import Loss, Running
from pykata.spec import Attachment, Served

log = logging.getLogger(__name__)

NOTICE = 2.0            # seconds between the end of a VMM and that of the process that made it end
TOGETHER = 0.1          # seconds in which a server ends after its VMM, or before it is noticed that that has ended
ABORTED_WITHIN = 30.0   # seconds in which a guest has its I/O fail; one that doesn't would hang

Lost = Callable[[], Awaitable[str]]


@asynccontextmanager
async def ended_with(vm: VM, those: Iterable[Lost]) -> AsyncIterator[None]:
    """End the machine when what serves it has ended: its guest would wait for an answer for ever."""

    async def end(lost: Lost) -> None:
        _end(vm, await lost())

    async with AsyncExitStack() as stack:
        for lost in those:
            await stack.enter_async_context(alongside(end(lost)))
        yield


def _end(vm: VM, why: str) -> None:
    vm.end(ShareLostError(f"the virtual machine was ended, because {why}"))


@asynccontextmanager
async def outliving(running: Running, served: Iterable[Served]) -> AsyncIterator[None]:
    """Have the guest's I/O fail on files whose server has ended. A machine whose guest can't do that is ended."""
    async with AsyncExitStack() as stack:
        for one in served:
            await stack.enter_async_context(alongside(_outlive(running, one)))
        yield


async def _outlive(running: Running, served: Served) -> None:
    why = await served.ended()
    if running.is_left:
        return      # it has ended with its machine
    # First: who gets an error from now on shall hear of it.
    loss = Loss(served.of_images, ShareLostError(f"files of the host are lost, because {why}"))
    running.losses.append(loss)
    running.on_loss(loss)
    with anyio.move_on_after(TOGETHER):
        await running.vm.died()
        return      # they ended together: nobody goes on
    log.warning("the guest goes on without files of the host, because %s", why)
    try:
        await _abort(running, served.tag)
    except AgentError as error:
        log.warning("the guest can't go on without files of the host: %s", error)
        _end(running.vm, why)


async def _abort(running: Running, tag: str) -> None:
    """Ask the guest, and again if it didn't answer because it was paused meanwhile: once more does no harm."""
    while True:
        resumed = running.resumed
        if running.is_paused:
            await resumed.wait()
            continue
        try:
            return await running.agent.abort_share(tag, timeout=ABORTED_WITHIN)
        except AgentError:
            if resumed is running.resumed and not running.is_paused:
                raise


@asynccontextmanager
async def explained(attached: Attachment) -> AsyncIterator[None]:
    """Add what became of the processes that serve a machine which didn't start: they may be the reason."""
    try:
        yield
    except BootError as error:
        those = any_end(attached)
        if those and (why := await _first(those)) is not None:
            if NO_NAMESPACE in why:
                raise not_permitted(why) from error
            raise BootError(f"{error.message}; {why}", console=error.console) from error
        raise


def any_end(attached: Attachment) -> tuple[Lost, ...]:
    """The ends of all that serves a machine."""
    return (*attached.lost, *(one.ended for one in attached.served))


async def _first(those: Iterable[Lost]) -> str | None:
    found: list[str] = []
    noted = anyio.Event()

    async def note(lost: Lost) -> None:
        found.append(await lost())
        noted.set()

    async with AsyncExitStack() as stack:
        for lost in those:
            await stack.enter_async_context(alongside(note(lost)))
        with anyio.move_on_after(NOTICE):
            await noted.wait()
    return found[0] if found else None
