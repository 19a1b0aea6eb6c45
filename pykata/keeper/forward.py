"""Passing a client's calls on to the agent, message by message.

A message is taken from one side when the other has room for it, so the back-pressure of each stream reaches from the
process in the guest to the client. What the guest sends is checked here as it is in any other host process.
"""

from __future__ import annotations

import socket

import anyio
from attrs import define, field

from pykata.agent import v1
from pykata.agent.client import AgentClient
from pykata.agent.server import Call, Handler, ServerChannel
from pykata.agent.stream import Stream
from pykata.concurrency import alongside
from pykata.errors import AgentError, AgentLostError, AgentRefusedError
from pykata.host import finish


@define
class Containers:
    """The containers that a client has made and not removed yet."""

    ids: set[str] = field(factory=set)

    def asked(self, name: str, data: bytes) -> None:
        """The client sends this as the first message of a call."""
        if name == "CreateContainer":
            self.ids.add(v1.CreateContainerRequest.parse(data).id)
        elif name == "Run" and (start := v1.RunRequest.parse(data).start) is not None and start.create is not None:
            self.ids.add(start.container_id)

    def answered(self, name: str, data: bytes) -> None:
        """The call that began with this message has ended well."""
        if name == "RemoveContainer":
            self.ids.discard(v1.RemoveContainerRequest.parse(data).id)


@define
class Forwarder:
    """One client's connection to the agent."""

    agent: AgentClient
    containers: Containers
    _channel: ServerChannel = field(init=False)

    async def serve(self, sock: socket.socket) -> None:
        """Pass on calls that come over ``sock``, which this owns, until it ends. Calls under way are then reset."""
        self._channel = await ServerChannel.over(sock)
        try:
            await self._channel.serve(self._method)
        finally:
            await finish(self._channel.aclose())

    def _method(self, name: str) -> Handler:
        async def forward(call: Call) -> None:
            try:
                await self._forward(call, name)
            except AgentError:
                if self.agent.is_lost:      # not the client's fault: it shall see its own connection end, too
                    self._channel.fail(AgentLostError, "the connection to the agent ended")
                raise

        return forward

    async def _forward(self, call: Call, name: str) -> None:
        first = await call.receive()
        if first is None:
            return
        self.containers.asked(name, first)
        with anyio.CancelScope() as scope:
            async with self.agent.call(name) as stream, alongside(_watch(call, scope)):
                await stream.send(first)
                async with alongside(_pass_on(call, stream)):
                    while (message := await stream.receive()) is not None:
                        await call.send(message)
                self._end(stream, name, first)

    def _end(self, stream: Stream, name: str, first: bytes) -> None:
        if stream.was_reset:
            stream.raise_for_status()
        status, said = stream.status()
        if status != "OK":
            raise AgentRefusedError(said, status=status)
        self.containers.answered(name, first)


async def _watch(call: Call, scope: anyio.CancelScope) -> None:
    await call.left.wait()
    scope.cancel()


async def _pass_on(call: Call, stream: Stream) -> None:
    while (message := await call.receive()) is not None:
        await stream.send(message)
    await stream.room(0)
    if not (call.was_reset or stream.is_gone):
        stream.send_now(b"", end=True)
