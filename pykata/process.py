"""A process in a container, named as :mod:`asyncio.subprocess` names things."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, NamedTuple

import anyio

from pykata.errors import AgentLostError, AgentRefusedError, AgentTimeoutError, SandboxClosedError
from pykata.running import Running

if TYPE_CHECKING:
    from pykata.agent.run import Exited, RunStream
    from pykata.agent.v1 import SignalRequestScope

UNREAD_LIMIT = 1024 * 1024
"""Bytes of one stream kept while only the other one is read; beyond it the process waits, as with a pipe."""


class ProcessId(NamedTuple):
    """Where the agent finds a process."""

    container: str
    process: str


class Output:
    """Standard output or error of a process: an async iterator of bytes, in pieces as they came."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._pieces: deque[bytes] = deque()
        self._size = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._pieces:
            if self._process.ended:
                raise StopAsyncIteration
            await self._process.advance(lambda: bool(self._pieces))
        return self.take()

    async def read(self) -> bytes:
        """All that is left, up to the end of the stream."""
        return b"".join([piece async for piece in self])

    def take(self) -> bytes:
        """The next piece that has come and wasn't read yet, without waiting; empty if there is none."""
        if not self._pieces:
            return b""
        piece = self._pieces.popleft()
        self._size -= len(piece)
        self._process.consumed()
        return piece

    def put(self, piece: bytes) -> None:
        """Take in what came from the guest."""
        self._pieces.append(piece)
        self._size += len(piece)

    @property
    def full(self) -> bool:
        """So much is unread that no more is taken in."""
        return self._size >= UNREAD_LIMIT


class Input:
    """Standard input of a process. Sending waits while the process doesn't read."""

    def __init__(self, running: Running, stream: RunStream) -> None:
        self._running = running
        self._stream = stream

    async def send(self, data: bytes) -> None:
        """Write ``data``. A process that closed its stdin, or ended, is no error: the data is gone, as in a shell."""
        async with self._running.explained():
            await self._stream.send_stdin(data)

    async def aclose(self) -> None:
        """End of input."""
        async with self._running.explained():
            await self._stream.close_stdin()


class Process:
    """A process in a container. Made by ``sb.process(...)`` and ``container.process(...)``.

    Read ``stdout`` and ``stderr`` while it runs: a process whose output nobody reads is stopped by back-pressure.
    """

    def __init__(
        self, running: Running, stream: RunStream, identity: ProcessId, args: tuple[str, ...], pid: int
    ) -> None:
        self._running = running
        self._stream = stream
        self._identity = identity
        self._exited: Exited | None = None
        self._left = False
        self._turn = anyio.Lock()
        self._room = anyio.Event()
        self.args = args
        """The command, as it was started."""
        self.pid = pid
        """Its process id in the container."""
        self.stdin = Input(running, stream)
        self.stdout = Output(self)
        self.stderr = Output(self)

    @property
    def ended(self) -> bool:
        """It has ended, and everything it wrote has arrived."""
        return self._exited is not None

    @property
    def exited(self) -> Exited | None:
        """What the agent said of its end."""
        return self._exited

    @property
    def returncode(self) -> int | None:
        """Exit code, 128 + the signal's number when one ended it, None while it runs."""
        return self._exited.exit_code if self._exited else None

    async def wait(self) -> int:
        """Wait until it has ended; returns its exit code.

        Output that comes meanwhile is kept for its readers, up to 1 MiB each; then the process waits for them.
        """
        while self._exited is None:
            await self.advance(lambda: self.ended)
        return self._exited.exit_code

    async def send_signal(self, number: int) -> None:
        """Send a signal to its process group. Nothing happens when it has ended."""
        from pykata.agent.v1 import SignalRequestScope

        await self._signal(number, SignalRequestScope.GROUP)

    async def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        await self.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL to it and to all its descendants, whatever their group."""
        from pykata.agent.v1 import SignalRequestScope

        try:
            await self._signal(signal.SIGKILL, SignalRequestScope.TREE)
        except AgentTimeoutError as silent:
            # Nothing else can be asked of an agent that doesn't answer this; another wait would only take longer.
            raise await self._running.why(silent) from silent

    async def _signal(self, number: int, scope: SignalRequestScope) -> None:
        if self.ended or self._left:
            return
        try:
            async with self._running.explained():
                await self._running.agent.signal(*self._identity, number, scope)
        except AgentRefusedError as refused:
            if refused.status != "NOT_FOUND":       # it has ended, and the news is still on its way
                raise

    def leave(self) -> None:
        """Its block is left: what runs of it is killed."""
        self._left = True
        self.consumed()

    async def advance(self, enough: Callable[[], bool]) -> None:
        """Take in one event from the guest, unless ``enough()`` when it is our turn to read."""
        async with self._turn:
            while self.stdout.full or self.stderr.full:
                if self.ended or enough():
                    return
                self._check_open()
                self._room = anyio.Event()
                await self._room.wait()
            self._check_open()
            if not self.ended and not enough():
                await self._take_one()

    async def _take_one(self) -> None:
        from pykata.agent.run import Exited, Stderr, Stdout

        try:
            event = await anext(self._stream)
        except AgentLostError as lost:
            raise await self._running.why(lost) from lost
        except AgentRefusedError:
            self._check_open()      # its own end of the call was reset
            raise
        match event:
            case Stdout(data):
                self.stdout.put(data)
            case Stderr(data):
                self.stderr.put(data)
            case Exited():
                self._exited = event
                return
        self._running.saw_output()

    def _check_open(self) -> None:
        if self._left and not self.ended:
            raise SandboxClosedError("this process is gone", hint="use it inside its 'async with' block")

    def consumed(self) -> None:
        """A reader took something: there is room for more."""
        self._room.set()
