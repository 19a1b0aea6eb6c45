"""A process of the fake agent, and the Run call that it lives in."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import anyio
from anyio.abc import ObjectReceiveStream, ObjectSendStream
from attrs import define, field

from pykata.agent.server import Call
from pykata.agent.v1 import Ended, Exited, RunRequest, RunResponse, Start, Started
from pykata.spec import Terminal
from pykata.testing.window import Allowance

PIECE = 64 * 1024


@define(eq=False)
class FakeProcess:
    """A process of the fake agent, as its program sees it."""

    args: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    user: str
    pid: int
    terminal: Terminal | None = None
    """Its terminal, which :meth:`Process.resize` exchanges. There is no line discipline."""
    rlimits: Mapping[str, tuple[int, int]] = field(factory=dict)
    """Soft and hard limits by the kernel's names, as the request gave them."""
    ignores: set[int] = field(factory=set, init=False)
    """Signals that don't end it. SIGKILL always does."""
    signals: list[int] = field(factory=list, init=False)
    """Those that it ignored, and SIGWINCH."""
    end: Exited | None = field(default=None, init=False)
    """How it ended."""
    _stdin: ObjectReceiveStream[bytes] = field(init=False)
    _output: ObjectSendStream[RunResponse] = field(init=False)
    _stdout_left: Allowance = field(factory=Allowance, init=False)
    _stderr_left: Allowance = field(factory=Allowance, init=False)
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
        await self._write(data, self._stdout_left, lambda piece: RunResponse(stdout=piece))

    async def write_error(self, data: bytes) -> None:
        """Write to its standard error. Waits while the host doesn't read."""
        if self.terminal is not None:
            await self.write(data)
        else:
            await self._write(data, self._stderr_left, lambda piece: RunResponse(stderr=piece))

    async def close_output(self) -> None:
        """Close its standard output, and run on."""
        await self._output.send(RunResponse(ended=Ended(stdout=True)))

    async def _write(self, data: bytes, left: Allowance, wrap: Callable[[bytes], RunResponse]) -> None:
        view = memoryview(data)
        while view:
            size = await left.take(min(len(view), PIECE))
            await self._output.send(wrap(bytes(view[:size])))
            view = view[size:]

    def kill(self, number: int, *, oom: bool = False) -> None:
        """Send it a signal. ``oom`` says that the kernel does it because there is no memory left."""
        if number == 0 or self.end is not None:
            return
        if number == signal.SIGWINCH or (number in self.ignores and number != signal.SIGKILL):
            self.signals.append(number)
            return
        self.end = Exited(exit_code=128 + number, signal=int(number), oom_killed=oom, oom_kills=int(oom))
        self._scope.cancel()

    async def gone(self) -> None:
        """Wait until it has ended."""
        await self._gone.wait()

    async def run(self, call: Call, start: Start, program: Callable[[FakeProcess], Awaitable[int]]) -> None:
        """Run it to its end, with its stdio in ``call``."""
        # No buffers: what isn't read stays in the windows of the connection, as it does with a real agent.
        to_stdin, self._stdin = anyio.create_memory_object_stream[bytes](0)
        self._output, output = anyio.create_memory_object_stream[RunResponse](0)
        self._stdout_left, self._stderr_left = Allowance(start.window), Allowance(start.window)
        try:
            await call.send(bytes(RunResponse(started=Started(pid=self.pid))))
            async with anyio.create_task_group() as group:
                group.start_soon(_kill_on_reset, call, group.cancel_scope)
                group.start_soon(self._take_requests, call, start, to_stdin)
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

    async def run_detached(
        self, program: Callable[[FakeProcess], Awaitable[int]], keep: Callable[[bytes], None]
    ) -> None:
        """Run it to its end without a call: its stdin is empty, and ``keep`` is given what it writes."""
        to_stdin, self._stdin = anyio.create_memory_object_stream[bytes](0)
        self._output, output = anyio.create_memory_object_stream[RunResponse](0)
        to_stdin.close()
        async with anyio.create_task_group() as group, output:
            group.start_soon(self._execute, program)
            async for response in output:
                keep(response.stdout or response.stderr or b"")

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

    async def _take_requests(self, call: Call, start: Start, to_stdin: ObjectSendStream[bytes]) -> None:
        # The host's stdin is bounded by its window; nothing of the calls waits for the program.
        to_queue, queue = anyio.create_memory_object_stream[bytes](10**6 if start.window else 0)
        async with anyio.create_task_group() as group:
            group.start_soon(self._feed, queue, to_stdin, bool(start.window))
            async with to_queue:
                if start.stdin_closed:
                    to_queue.close()
                while (data := await call.receive()) is not None:
                    request = RunRequest.parse(data)
                    if request.window is not None:
                        self._stdout_left.grow(request.window.stdout)
                        self._stderr_left.grow(request.window.stderr)
                    elif request.stdin is not None:
                        await to_queue.send(request.stdin)
                    else:
                        to_queue.close()

    async def _feed(self, queue: ObjectReceiveStream[bytes], stdin: ObjectSendStream[bytes], windows: bool) -> None:
        async with stdin, queue:
            async for data in queue:
                with suppress(anyio.BrokenResourceError):       # the process has closed it, which is no error
                    await stdin.send(data)
                with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):    # it has ended
                    if windows:
                        await self._output.send(RunResponse(stdin_window=len(data)))


async def _kill_on_reset(call: Call, scope: anyio.CancelScope) -> None:
    await call.left.wait()
    scope.cancel()
