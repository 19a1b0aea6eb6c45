"""Volumes that this process serves itself, over the agent's connection."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import anyio
from attrs import define, field

from pykata.concurrency import alongside
from pykata.errors import AgentError, AgentTimeoutError
from pykata.fs.fuse.server import Server
from pykata.fs.fuse.wire import DATA, MalformedError
from pykata.spec import VOLUMES
from pykata.volumes.kinds import FsspecVolume
from pykata.volumes.places import Checked

if TYPE_CHECKING:
    from pykata.agent.client import AgentClient
    from pykata.agent.stream import Stream

log = logging.getLogger(__name__)

PIECE = 64 * 1024 - 64      # bytes of data in one message: agent.proto
KEPT = {"auto": 1.0, "always": 86400.0, "none": 0.0}        # seconds for which the guest doesn't ask again


@asynccontextmanager
async def serving(agent: AgentClient, volumes: Mapping[str, Checked]) -> AsyncIterator[None]:
    """Serve those of the volumes that are filesystems of this program, each mounted in the guest when this yields."""
    async with AsyncExitStack() as stack:
        for number, volume in enumerate(volumes.values()):
            if isinstance(volume, FsspecVolume):
                await stack.enter_async_context(_served(agent, f"{VOLUMES}/fsspec{number}", volume))
        yield


@asynccontextmanager
async def _served(agent: AgentClient, target: str, volume: FsspecVolume) -> AsyncIterator[None]:
    from pykata.agent.v1 import Served, ServeRequest
    from pykata.fs.fsspec_tree import FsspecTree
    from pykata.fs.quota import Quota

    assert isinstance(volume.buffer, int)
    assert not isinstance(volume.size, str)
    quota = Quota(volume.size, volume.files)
    tree = FsspecTree(volume.fs, volume.path, readonly=volume.readonly, buffer=volume.buffer, quota=quota)
    options = ["nosuid", "nodev", f"max_read={DATA}"]
    options += ["ro"] if volume.readonly else []
    async with agent.call("Serve") as stream:
        await stream.send(bytes(ServeRequest(start=Served(target=target, options=options))))
        mounting = _Mounting()
        async with alongside(_work(stream, Server(tree, volume.timeout, KEPT[volume.cache]), mounting)):
            with anyio.move_on_after(volume.timeout + 10):
                await mounting.settled.wait()
            if not mounting.done:
                raise mounting.failure or AgentTimeoutError(f"the agent didn't mount {target} in time")
            yield


@define
class _Mounting:
    settled: anyio.Event = field(factory=anyio.Event)
    done: bool = False
    failure: AgentError | None = None


async def _work(stream: Stream, server: Server, mounting: _Mounting) -> None:
    from pykata.agent.typed import decoded
    from pykata.agent.v1 import ServeRequest, ServeResponse

    async def receive() -> bytes | None:
        while (message := await stream.receive(PIECE + 64)) is not None:
            try:
                response = decoded(ServeResponse, message)
            except ValueError as exc:
                stream.broken(f"sent something in Serve that {exc}")
            if response.data:
                return response.data
            mounting.done = True
            mounting.settled.set()
        stream.raise_for_status()
        return None

    async def send(data: bytes) -> None:
        for at in range(0, len(data), PIECE):
            await stream.send(bytes(ServeRequest(data=data[at:at + PIECE])))

    try:
        await server.serve(receive, send)
    except* MalformedError as malformed:
        # The guest's kernel gets errors from now on, and the sandbox goes on.
        log.warning("a volume isn't served any more, as the guest sent %s", malformed.exceptions[0])
    except* AgentError as lost:
        # What becomes of the sandbox is told elsewhere.
        mounting.failure = next((one for one in lost.exceptions if isinstance(one, AgentError)), None)
    finally:
        mounting.settled.set()
