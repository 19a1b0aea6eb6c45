"""The far end of the agent's connection: as much of a gRPC server as who stands in for an agent needs.

That is an agent in memory, and the keeper of a detached sandbox, which passes on what its clients ask of the real one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import quote

import anyio

from pykata.agent.channel import Channel
from pykata.agent.stream import STATUS, Headers, Stream
from pykata.errors import AgentError, AgentLostError, AgentRefusedError
from pykata.host import finish

SERVICE = "/pykata.agent.v1.Agent/"


class Call(Stream):
    """A call as its server sees it."""

    def __init__(self, channel: Channel, stream_id: int) -> None:
        super().__init__(channel, stream_id)
        self.left = asyncio.Event()
        """The host has left the call before its end."""

    def ended(self, reset: int | None) -> None:
        super().ended(reset)
        if reset is not None:
            self.left.set()


Handler = Callable[[Call], Awaitable[None]]


class ServerChannel(Channel):
    """A connection that takes calls rather than making them."""

    def __init__(self) -> None:
        super().__init__(client_side=False)
        self._calls: asyncio.Queue[tuple[Call, str]] = asyncio.Queue()

    async def serve(self, find: Callable[[str], Handler | None]) -> None:
        """Answer calls, each in a task of its own, until the connection ends; ``find`` knows who answers, by name."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._until_closed, group.cancel_scope)
            while True:
                call, name = await self._calls.get()
                group.start_soon(self._answer, call, find(name), name)

    def _accept(self, stream_id: int, headers: Headers) -> None:
        path = dict(headers).get(b":path", b"").decode("ascii", "replace")
        call = self._streams[stream_id] = Call(self, stream_id)
        self._calls.put_nowait((call, path.removeprefix(SERVICE)))

    async def _until_closed(self, scope: anyio.CancelScope) -> None:
        await self._closed.wait()
        scope.cancel()

    async def _answer(self, call: Call, handler: Handler | None, name: str) -> None:
        trailers = [(b"grpc-status", b"0")]
        try:
            self._send(call, [(b":status", b"200"), (b"content-type", b"application/grpc")])
            if handler is None:
                raise AgentRefusedError(f"there is no method {name}", status="UNIMPLEMENTED")
            await handler(call)
        except AgentRefusedError as refusal:
            trailers = [
                (b"grpc-status", str(STATUS.index(refusal.status)).encode()),
                (b"grpc-message", quote(refusal.message).encode()),
            ]
        except AgentError:
            pass        # the host has gone
        except ExceptionGroup as group:
            if (mistake := group.split(AgentError)[1]) is not None:
                raise mistake from None
        except BaseException:
            # Something killed this agent. One that was killed says no farewell.
            self.fail(AgentLostError, "the agent ended")
            raise
        self._send(call, trailers, end=True)
        call.close()

    def _send(self, call: Call, headers: Headers, *, end: bool = False) -> None:
        if not call.is_gone and not self.has_failed:
            self.h2.send_headers(call.id, headers, end_stream=end)
            self.flush()


async def serve(sock: socket.socket, methods: Mapping[str, Handler]) -> None:
    """Take calls over ``sock`` until the other end closes it."""
    channel = await ServerChannel.over(sock)
    try:
        await channel.serve(methods.get)
    finally:
        await finish(channel.aclose())
