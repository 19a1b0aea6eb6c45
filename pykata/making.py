"""Containers in the guest: how they are made before somebody wants one, and removed, whatever happens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from pykata.errors import AgentError, SandboxClosedError
from pykata.host import finish
from pykata.origin import SavedContainer
from pykata.running import Running
from pykata.spec import Image

if TYPE_CHECKING:
    from pykata.rootfs import Prepared


def saved_container(
    running: Running, identity: str, image: Image, *, fresh: bool = False, rehearsal: bool = False
) -> SavedContainer:
    """What a sandbox that goes on from this one has to know of a container."""
    return SavedContainer(
        id=identity, reference=image.reference, digest=image.digest, config=image.config,
        architecture=image.architecture, disk=running.options.disk, fresh=fresh, rehearsal=rehearsal,
    )  # fmt: skip


@asynccontextmanager
async def fresh_container(
    running: Running, rootfs: Prepared, *, explored: bool = False, rehearsal: bool = False
) -> AsyncIterator[None]:
    """A container that nothing has run in, and in which a process waits for a command.

    ``explored``: it has looked up what that may be, which takes long and is worth it in a guest that will be saved.
    ``rehearsal``: it is for that, and for nobody else.
    """
    from pykata.requests import container_request

    await running.settled()
    identity = running.new_id("c")
    running.containers[identity] = saved_container(
        running, identity, rootfs.image, fresh=not rehearsal, rehearsal=rehearsal
    )
    try:
        async with running.explained():
            request = container_request(running, identity, rootfs, waits=True, explored=explored)
            await running.agent.create_container(request)
        yield
    finally:
        if running.containers.pop(identity, None) is not None:      # else it is theirs who took it
            await finish(remove_container(running, identity))


@asynccontextmanager
async def removed(running: Running, identity: str) -> AsyncIterator[str]:
    """See to it that the container is gone before its disk is unplugged, whatever happened.

    A guest that doesn't manage that can't be trusted with its disk slots any more: the sandbox is marked broken.
    """
    try:
        yield identity
    finally:
        await finish(remove_container(running, identity))


async def remove_container(running: Running, identity: str) -> None:
    """See to it that a container is gone; a guest that doesn't manage that is marked broken. Never fails."""
    if running.broken is not None:
        return
    if running.is_paused:
        running.broken = SandboxClosedError("a container was left while this sandbox was paused",
                                            hint="resume it before its containers are left")
        return
    try:
        await running.agent.remove_container(identity)
    except AgentError as error:
        await running.why(error)
