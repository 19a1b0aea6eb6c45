"""Saved guests on their way from disk: a machine is started while a thread still reads what its memory was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio.to_thread
from attrs import evolve

from pykata import saved
from pykata.host import finish
from pykata.origin import Origin
from pykata.spec import Start


@asynccontextmanager
async def loading(folder: Path, start: Start) -> AsyncIterator[Origin]:
    """A saved guest from a directory, while the block runs. Its memory is whole when ``vm.whole()`` has returned.

    Raises SavedDamagedError and SavedMissingError for all but the memory, for which ``vm.whole()`` does, and HostError.
    """
    with ExitStack() as stack:
        # To the end, as with what comes after it: a thread can't be stopped, and uses what is closed here.
        begin = anyio.to_thread.run_sync(lambda: stack.enter_context(saved.begun(folder, start)))
        origin, fill = await finish(begin)
        # No task: those are cancelled together when a loop ends, and the thread would go on without its descriptors.
        filling = asyncio.get_running_loop().run_in_executor(None, fill)

        async def whole() -> None:
            await asyncio.shield(filling)       # it is everybody's

        try:
            yield evolve(origin, vm=evolve(origin.vm, whole=whole, is_loading=lambda: not filling.done()))
        finally:
            await finish(_settled(filling))


async def _settled(work: asyncio.Future[None]) -> None:
    await asyncio.wait([work])
    if not work.cancelled():
        work.exception()        # seen: nobody has to wait for it
