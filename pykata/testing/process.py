"""A process of the fake agent, and the Run call that it lives in."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Mapping

import anyio
from anyio.abc import ObjectReceiveStream, ObjectSendStream
from attrs import define, field

from pykata.agent.server import Call
from pykata.agent.v1 import Exited, RunRequest, RunResponse, Started

PIECE = 64 * 1024


@define(eq=False)
class FakeProcess:
    """A process of the fake agent, as its program sees it."""

    args: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    user: str
    pid: int
    ignores: set[int] = field(factory=set, init=False)
    """Signals that don't end it. SIGKILL always does."""
    end: Exited | None = field(default=None, init=False)
    """How it ended."""
    _stdin: ObjectReceiveStream[bytes] = field(init=False)
    _output: ObjectSendStream[RunResponse] = field(init=False)
    _scope: anyio.CancelScope = field(factory=anyio.CancelScope, init=False)
    _gone: anyio.Event = field(factory=anyio.Event, init=False)

    async def read(self) -> bytes:
        """The next piece of its standard input; empty at the end of it."""
        try:
            return await self._stdin.receive()
        except anyio.EndOfStream:
            return b""

    async def write(self, data: bytes) -> None:
        """Write to its standard output. Waits while the host doesn't read."""
        for at in range(0, len(data), PIECE):
            await self._output.send(RunResponse(stdout=data[at : at + PIECE]))

    async def write_error(self, data: bytes) -> None:
        """Write to its standard error. Waits while the host doesn't read."""
        for at in range(0, len(data), PIECE):
            await self._output.send(RunResponse(stderr=data[at : at + PIECE]))

    def kill(self, number: int, *, oom: bool = False) -> None:
        """Send it a signal. ``oom`` says that the kernel does it because there is no memory left."""
        if number == 0 or self.end is not None or (number in self.ignores and number != signal.SIGKILL):
            return
        self.end = Exited(exit_code=128 + number, signal=int(number), oom_killed=oom)
        self._scope.cancel()

    async def gone(self) -> None:
        """Wait until it has ended."""
        await self._gone.wait()

    async def run(self, call: Call, program: Callable[[FakeProcess], Awaitable[int]]) -> None:
        """Run it to its end, with its stdio in ``call``."""
        # No buffers: what isn't read stays in the windows of the connection, as it does with a real agent.
        to_stdin, self._stdin = anyio.create_memory_object_stream[bytes](0)
        self._output, output = anyio.create_memory_object_stream[RunResponse](0)
        try:
            await call.send(bytes(RunResponse(started=Started(pid=self.pid))))
            async with anyio.create_task_group() as group:
                group.start_soon(_kill_on_reset, call, group.cancel_scope)
                group.start_soon(_feed, call, to_stdin)
                group.start_soon(self._execute, program)
                async with output:
                    async for response in output:
                        await call.send(bytes(response))
                group.cancel_scope.cancel()
            await call.send(bytes(RunResponse(exited=self.end)))
        finally:
            for end in (to_stdin, self._stdin, self._output, output):
                end.close()
            self._gone.set()

    async def _execute(self, program: Callable[[FakeProcess], Awaitable[int]]) -> None:
        async with self._output, self._stdin:
            with self._scope:
                try:
                    code = await program(self)
                except Exception as exc:  # as an interpreter ends a program
                    await self.write_error(f"{type(exc).__name__}: {exc}\n".encode())
                    code = 1
                self.end = self.end or Exited(exit_code=code & 0xFF)
            self._gone.set()


async def _feed(call: Call, stdin: ObjectSendStream[bytes]) -> None:
    async with stdin:
        while (data := await call.receive()) is not None:
            request = RunRequest.parse(data)
            if request.stdin is None:
                return
            try:
                await stdin.send(request.stdin)
            except anyio.BrokenResourceError:
                continue    # the process has closed it, which is no error


async def _kill_on_reset(call: Call, scope: anyio.CancelScope) -> None:
    await call.left.wait()
    scope.cancel()
