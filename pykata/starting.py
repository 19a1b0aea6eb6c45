"""Starting processes: in a container that is there, or in one of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from attrs import define

from pykata.background import Background
from pykata.command import Command
from pykata.host import finish
from pykata.making import remove_container
from pykata.process import Process
from pykata.running import ProcessId, Running
from pykata.spec import Image, PullPolicy

if TYPE_CHECKING:
    from pykata.agent.v1 import Start


@asynccontextmanager
async def started(running: Running, start: Start, image: Image) -> AsyncIterator[Process]:
    """Start a process; its stream is reset when left early, which kills it. The guest must not be paused."""
    assert start.process is not None
    identity = ProcessId(start.container_id, start.process.id)
    args, tty = tuple(start.process.args), start.process.terminal is not None
    async with AsyncExitStack() as stack:
        async with running.explained(image):
            stream = await stack.enter_async_context(running.agent.run(start))
            pid = await stream.started()
        process = Process(running, stream, identity, args, pid, tty=tty, shared_root=running.has_shared_root(image))
        try:
            yield process
        finally:
            process.leave()
        if process.ended:
            async with running.explained():
                await stream.finished()


async def detached(running: Running, start: Start) -> Background:
    """Start a process that outlives this call."""
    await running.settled()
    running.check()
    assert start.process is not None
    async with running.explained(), running.agent.run(start) as stream:
        pid = await stream.started()
        await stream.finished()
    return Background(
        running, ProcessId(start.container_id, start.process.id), tuple(start.process.args), pid
    )


@asynccontextmanager
async def single_process(
    running: Running, image: str | Image, what: Command, pull: PullPolicy | None = None
) -> AsyncIterator[Process]:
    """A process in a container of its own, in one round trip; the container goes with it.

    Once the process has ended nobody waits for that, but for what it has written to volumes.
    """
    running.check()
    removals = None if running.options.volumes else running.removals
    async with AsyncExitStack() as stack:
        container = _in_container(running, image, what, pull, lingers=removals is not None)
        process = await stack.enter_async_context(container)
        yield process
        if process.ended and removals is not None and removals is running.removals:
            removals.begin(stack.pop_all())


@asynccontextmanager
async def _in_container(
    running: Running, image: str | Image, what: Command, pull: PullPolicy | None, *, lingers: bool
) -> AsyncIterator[Process]:
    """The process, until its container is gone."""
    from pykata.requests import container_request, start_request
    from pykata.rootfs import prepared

    async with prepared(running, image, pull) as rootfs, _new_or_waiting(running, rootfs.image) as own:
        config = rootfs.image.config
        args = what.argv(config)
        create = None if own.fresh else container_request(running, own.id, rootfs)
        start = start_request(running, own.id, args, what, user=config.user, create=create, last=own.fresh,
                              lingers=lingers)
        async with started(running, start, rootfs.image) as process:
            yield process
        own.is_gone = process.ended     # the agent ends such a call well when it has removed the container
    if running.waiting is not None:
        running.waiting.ran(rootfs.image)


@define
class _Own:
    """A container for one process. ``fresh``: it is there already. ``is_gone``: it is known to be removed."""

    id: str
    fresh: bool
    is_gone: bool = False


@asynccontextmanager
async def _new_or_waiting(running: Running, image: Image) -> AsyncIterator[_Own]:
    fresh = await running.take_fresh(image)     # raises where the guest is paused: nothing is to be removed then
    own = _Own(fresh or running.new_id("c"), fresh is not None)
    try:
        yield own
    finally:
        if not own.is_gone:
            await finish(remove_container(running, own.id))
