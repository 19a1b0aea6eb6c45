"""Noticing that a process has ended without which a virtual machine can't go on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

from pykata.concurrency import alongside
from pykata.errors import BootError, ShareLostError
from pykata.fs.helper import NO_NAMESPACE, not_permitted
from pykata.hypervisors.base import VM
from pykata.spec import Attachment

NOTICE = 2.0            # seconds between the end of a VMM and that of the process that made it end

Lost = Callable[[], Awaitable[str]]


@asynccontextmanager
async def ended_with(vm: VM, attached: Attachment) -> AsyncIterator[None]:
    """End the machine when what serves it has ended: its guest would wait for an answer for ever."""

    async def end(lost: Lost) -> None:
        vm.end(ShareLostError(f"the virtual machine was ended, because {await lost()}"))

    async with AsyncExitStack() as stack:
        for lost in attached.lost:
            await stack.enter_async_context(alongside(end(lost)))
        yield


@asynccontextmanager
async def explained(attached: Attachment) -> AsyncIterator[None]:
    """Add what became of the processes that serve a machine which didn't start: they may be the reason."""
    try:
        yield
    except BootError as error:
        if attached.lost and (why := await _first(attached)) is not None:
            if NO_NAMESPACE in why:
                raise not_permitted(why) from error
            raise BootError(f"{error.message}; {why}", console=error.console) from error
        raise


async def _first(attached: Attachment) -> str | None:
    found: list[str] = []
    noted = anyio.Event()

    async def note(lost: Lost) -> None:
        found.append(await lost())
        noted.set()

    async with AsyncExitStack() as stack:
        for lost in attached.lost:
            await stack.enter_async_context(alongside(note(lost)))
        with anyio.move_on_after(NOTICE):
            await noted.wait()
    return found[0] if found else None
