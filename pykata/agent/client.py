"""The calls that the host makes to the agent.

Importing this costs tens of milliseconds (h2, betterproto2), so import it where a sandbox is entered.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
from betterproto2 import Message

from pykata.agent.channel import Channel
from pykata.agent.guard import EARLY
from pykata.agent.run import Ended, Exited, OutputEvent, Room, RunStream, Stderr, Stdout
from pykata.agent.short import LONGEST_COMMAND, command
from pykata.agent.staging import Lend, Staging
from pykata.agent.start import encoded_start
from pykata.agent.stream import MAX_MESSAGE, Headers, Stream
from pykata.agent.typed import decoded
from pykata.agent.v1 import (
    AbortShareRequest,
    AbortShareResponse,
    CloneRequest,
    CloneResponse,
    CreateContainerRequest,
    CreateContainerResponse,
    HoldRequest,
    HoldResponse,
    InspectRequest,
    InspectResponse,
    RemoveContainerRequest,
    RemoveContainerResponse,
    ResizeRequest,
    ResizeResponse,
    RunRequest,
    SetupRequest,
    SetupResponse,
    SignalRequest,
    SignalRequestScope,
    SignalResponse,
    Start,
    StatsRequest,
    StatsResponse,
    Terminal,
)
from pykata.errors import AgentError, AgentTimeoutError, ConfigError, printable
from pykata.host import finish

__all__ = [
    "AgentClient", "Ended", "Exited", "OutputEvent", "Room", "RunStream", "Scope", "Stderr", "Stdout", "connect",
]  # fmt: skip

Scope = SignalRequestScope
LATE = 0.25                     # seconds by which a guest's clock may be wrong
CORRECTIONS = 4                 # how often it is set right; on a busy host each of them may be late, too
MAX_ANSWER = 128 * 1024         # bytes of an answer to anything but Run; decoding is slow, so this also bounds a stall

_Answer = TypeVar("_Answer", bound=Message)


class AgentClient:
    """The agent of one virtual machine. Made by :func:`connect`.

    Every call raises AgentLostError when the connection ends, AgentTimeoutError after ``timeout`` seconds,
    AgentRefusedError when the agent says no, and AgentProtocolError for what no agent would send.
    """

    def __init__(self, channel: Channel, *, bulk: bool = True) -> None:
        self._channel = channel
        self._bulk = bulk
        self._short = False     # the agent takes short commands

    async def setup(self, request: SetupRequest, *, timeout: float = 60.0) -> SetupResponse:
        """Make the guest ready. The first call; waits until the guest has booted as far as its agent.

        The clock is filled in here, and entropy if there is none.
        """
        with anyio.move_on_after(timeout):
            # A request sent before the guest has booted would bring it the time of when the boot began.
            await self._channel.ready()
            request.unix_time_ns = time.time_ns()
            request.entropy = request.entropy or os.urandom(64)
            answer = await self._call("Setup", request, SetupResponse, timeout)
            self._short = self._bulk and answer.short_commands
            answer.agent_version = printable(answer.agent_version.encode(), 64)
            answer.kernel_release = printable(answer.kernel_release.encode(), 64)
            return answer
        raise AgentTimeoutError(f"the agent didn't answer Setup within {timeout:g} s")

    async def clone(self, request: CloneRequest, *, timeout: float = 60.0) -> CloneResponse:
        """Tell a guest that goes on from a saved one that it is another one now. The clock is filled in here.

        By when the guest gets it, the machine may have taken its time to start: a clock that is late by more than
        :data:`LATE` is corrected at once, and again if that was late, too.
        """
        answer = await self._clone(request, timeout)
        self._short = self._bulk and answer.short_commands
        last = answer
        for _ in range(CORRECTIONS):
            if abs(time.time_ns() - last.unix_time_ns) <= LATE * 1e9:
                break
            last = await self._clone(CloneRequest(), timeout)
        return answer

    async def _clone(self, request: CloneRequest, timeout: float) -> CloneResponse:
        request.unix_time_ns = time.time_ns()
        if not self._channel.takes_clone:
            return await self._call("Clone", request, CloneResponse, timeout)
        data = encoded(request)
        with anyio.move_on_after(timeout):
            stream = self._channel.call_ahead(data)
            try:
                return self._decoded(stream, "Clone", CloneResponse, await stream.answer(MAX_ANSWER))
            finally:
                stream.close()
        raise AgentTimeoutError(f"the agent didn't answer Clone within {timeout:g} s")

    async def hold(self, hold: bool, *, timeout: float = 10.0) -> None:
        """Have all processes that run outlive their connection, or no longer."""
        await self._call("Hold", HoldRequest(hold=hold), HoldResponse, timeout)

    async def hold_all(self, *, timeout: float = 10.0) -> None:
        """Have them outlive it, and say nothing more until :meth:`let_go`, so that the agent is between two frames."""
        data = encoded(HoldRequest(hold=True))
        with anyio.move_on_after(timeout):
            await self.rest()
            stream = await self._begin("Hold", data, end=True)
            self._channel.withhold()        # there was no await since that was written
            try:
                await self._answer(stream, "Hold", HoldResponse)
            finally:
                stream.close()
            return
        raise AgentTimeoutError(f"the agent didn't answer Hold within {timeout:g} s")

    async def let_go(self) -> None:
        """Have them end with it again, and say what there is to say."""
        self._channel.release()
        self.go_on()
        await self.hold(False)

    async def park(self, *, timeout: float = 10.0) -> bytes:
        """Leave the agent waiting for its next host; returns its greeting. The last call. See :mod:`.parking`."""
        with anyio.move_on_after(timeout):
            await self.rest()
            return await self._channel.park()
        raise AgentTimeoutError(f"the agent didn't take a new connection within {timeout:g} s")

    @property
    def greeting(self) -> bytes:
        """How the agent greeted this connection: it greets the next one the same way."""
        return self._channel.greeting

    async def create_container(self, request: CreateContainerRequest, *, timeout: float = 60.0) -> None:
        """Make a container that outlives the commands run in it."""
        await self._call("CreateContainer", request, CreateContainerResponse, timeout)

    async def remove_container(self, container_id: str, *, timeout: float = 30.0) -> None:
        """Kill what runs in a container and take it down. Returns when its devices can be unplugged."""
        request = RemoveContainerRequest(id=container_id)
        await self._call("RemoveContainer", request, RemoveContainerResponse, timeout)

    async def signal(
        self, container_id: str, process_id: str, number: int, scope: Scope = Scope.GROUP, *, timeout: float = 10.0
    ) -> None:
        """Send a signal to a running process, or to what it has started."""
        request = SignalRequest(container_id=container_id, process_id=process_id, signal=number, scope=scope)
        await self._call("Signal", request, SignalResponse, timeout)

    async def resize(
        self, container_id: str, process_id: str, rows: int, cols: int, *, timeout: float = 10.0
    ) -> None:
        """Give the terminal of a running process another size."""
        request = ResizeRequest(
            container_id=container_id, process_id=process_id, terminal=Terminal(rows=rows, cols=cols)
        )
        await self._call("Resize", request, ResizeResponse, timeout)

    async def inspect(
        self, container_id: str, process_id: str, *, wait: bool = False, timeout: float = 10.0
    ) -> InspectResponse:
        """What became of a detached process; with ``wait`` when it has ended, however long that takes."""
        request = InspectRequest(container_id=container_id, process_id=process_id, wait=wait)
        return await self._call("Inspect", request, InspectResponse, math.inf if wait else timeout)

    async def abort_share(self, tag: str, *, timeout: float = 10.0) -> None:
        """Have the guest's I/O fail on a virtio-fs device whose server has ended."""
        await self._call("AbortShare", AbortShareRequest(tag=tag), AbortShareResponse, timeout)

    async def stats(self, *, timeout: float = 10.0) -> StatsResponse:
        """What the guest and its containers use."""
        return await self._call("Stats", StatsRequest(), StatsResponse, timeout)

    @asynccontextmanager
    async def run(self, start: Start, *, timeout: float = 60.0) -> AsyncIterator[RunStream]:
        """Start a command; it must be running ``timeout`` seconds after :meth:`RunStream.started` asks for it.

        Leaving the context before the end kills the command (and removes a container that was made for it)::

            async with agent.run(Start(container_id="c1", process=Process(id="p1", args=["cat"]))) as command:
                await command.send_stdin(b"hello")
                await command.close_stdin()
                async for event in command:
                    ...
                await command.finished()
        """
        with anyio.move_on_after(timeout) as scope:
            stream = await self._begin_run(start)
        if scope.cancelled_caught:
            raise AgentTimeoutError(f"the agent didn't take the command within {timeout:g} s")
        run = RunStream(stream, start, timeout)
        try:
            yield run
        finally:
            stream.close()
            run.leave()
        await run.left()        # not after a failure, nor a cancellation: the agent may never answer

    @asynccontextmanager
    async def call(self, name: str) -> AsyncIterator[Stream]:
        """A call as it is, for who passes on messages without knowing them. Reset when left before its end."""
        stream = await self._channel.open(request_headers(name))
        try:
            yield stream
        finally:
            stream.close()

    async def rest(self) -> None:
        """Have nothing sent beside the port any more, until :meth:`go_on`."""
        if self._channel.staging is not None:
            await self._channel.staging.rest()

    def go_on(self) -> None:
        """Data may be sent beside the port again."""
        if self._channel.staging is not None:
            self._channel.staging.go_on()

    async def lost(self) -> AgentError:
        """Wait until the connection has ended; returns why."""
        return await self._channel.ended()

    @property
    def is_lost(self) -> bool:
        """The connection has ended."""
        return self._channel.has_failed

    async def _call(self, name: str, request: Message, answer: type[_Answer], timeout: float) -> _Answer:
        data = encoded(request)
        with anyio.move_on_after(timeout):
            stream = await self._begin(name, data, end=True)
            try:
                return await self._answer(stream, name, answer)
            finally:
                stream.close()
        raise AgentTimeoutError(f"the agent didn't answer {name} within {timeout:g} s")

    async def _begin(self, name: str, request: bytes, *, end: bool = False) -> Stream:
        stream = await self._channel.open(request_headers(name))
        try:
            await stream.send(request, end=end)
        except BaseException:
            stream.close()
            raise
        return stream

    async def _begin_run(self, start: Start) -> Stream:
        if self._channel.takes_early and self._bulk and start.window:
            start.bulk = EARLY
            return self._channel.begin_early(bounded(encoded_start(start)))
        alone = start.create is None and not start.last and not start.detached
        if self._short and start.collected and start.window and start.stdin_closed and alone:
            start.bulk = self._channel.next_number()
            if len(request := encoded_start(start)) <= LONGEST_COMMAND:
                attach = bytes(RunRequest(attach=start.bulk))
                return await command(self._channel, start.bulk, request, request_headers("Run"), attach)
        stream = await self._channel.open(request_headers("Run"))
        start.bulk = stream.id if self._bulk and start.window else 0
        try:
            await stream.send(bounded(encoded_start(start)))
        except BaseException:
            stream.close()
            raise
        return stream

    async def _answer(self, stream: Stream, name: str, answer: type[_Answer]) -> _Answer:
        data = await stream.receive(MAX_ANSWER)
        if data is not None and await stream.receive(MAX_ANSWER) is not None:
            stream.broken(f"answered {name} more than once")
        stream.raise_for_status()
        if data is None:
            stream.broken(f"said that {name} went well, without an answer")
        return self._decoded(stream, name, answer, data)

    def _decoded(self, stream: Stream, name: str, answer: type[_Answer], data: bytes) -> _Answer:
        try:
            return decoded(answer, data)
        except ValueError as exc:
            stream.broken(f"sent an answer to {name} that {exc}")


@asynccontextmanager
async def connect(
    sock: socket.socket, *, greeting: bytes = b"", parked: bool = False, bulk: bool = True, lend: Lend | None = None
) -> AsyncIterator[AgentClient]:
    """The agent at the other end of a connected stream socket, which is closed when the context is left.

    ``greeting`` and ``parked`` are about one that was saved with its machine: see :mod:`.parking`.

    Without ``bulk`` all output comes by gRPC, which somebody in between can pass on. ``lend`` is where disk slots come
    from, for data that is sent beside the port.

    The guest may not have booted yet; :meth:`AgentClient.setup` waits for it::

        async with connect(sock) as agent:
            await agent.setup(SetupRequest(hostname="guest"), timeout=60)
    """
    channel = await Channel.over(sock, greeting=greeting, parked=parked)
    staging = channel.staging = Staging(channel, lend) if lend is not None else None
    try:
        yield AgentClient(channel, bulk=bulk)
    finally:
        if staging is not None and not staging.is_idle:
            await finish(staging.aclose())
        await finish(channel.aclose())


def request_headers(name: str) -> Headers:
    """What opens a call (gRPC, PROTOCOL-HTTP2.md, "Requests")."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", f"/pykata.agent.v1.Agent/{name}".encode()),
        (b":authority", b"agent"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"pykata"),
    ]


def encoded(request: Message) -> bytes:
    """A request as bytes, :func:`bounded`."""
    return bounded(bytes(request))


def bounded(data: bytes) -> bytes:
    """A request. Raises ConfigError if it is larger than the protocol allows."""
    if len(data) > MAX_MESSAGE:
        raise ConfigError(f"the request is {len(data)} bytes long; the agent takes at most {MAX_MESSAGE}")
    return data
