"""A process in a container, named as :mod:`asyncio.subprocess` names things."""

from __future__ import annotations

import signal as signals
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

import anyio

from pykata.buffers import bytes_of
from pykata.concurrency import alongside
from pykata.errors import (
    AgentLostError,
    AgentRefusedError,
    AgentTimeoutError,
    ConfigError,
    SandboxClosedError,
    ShareLostError,
    VMDiedError,
)
from pykata.options import check_signal, check_terminal_size
from pykata.running import ProcessId, Running
from pykata.spec import Reason
from pykata.streams import Input, Output

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pykata.agent.run import Exited, RunStream
    from pykata.agent.v1 import SignalRequestScope


class End(Protocol):
    """What the agent tells of a process's end."""

    @property
    def signal(self) -> int: ...
    @property
    def oom_killed(self) -> bool: ...


class Process:
    """A process in a container. Made by ``sb.process(...)`` and ``container.process(...)``.

    Read ``stdout`` and ``stderr`` while it runs: a process whose output nobody reads is made to wait once 1 MiB of it
    is unread, or 4 MiB of a stream that has brought much. Each of the two streams has that for itself.
    """

    def __init__(
        self, running: Running, stream: RunStream, identity: ProcessId, args: tuple[str, ...], pid: int, *, tty: bool,
        shared_root: bool = False,
    ) -> None:  # fmt: skip
        self._running = running
        self._stream = stream
        self._identity = identity
        self._shared_root = shared_root
        self._exited: Exited | None = None
        self._lost: ShareLostError | None = None
        self._left = False
        self._reading = False
        self._news = anyio.Event()
        self.args = args
        """The command, as it was started."""
        self.pid = pid
        """Its process id in the container."""
        self.tty = tty
        """It has a terminal: what it writes to that comes on ``stdout``, and nothing on ``stderr``."""
        self.stdin = Input(self, running, stream)
        self.stdout = Output(self, lambda size: stream.took("stdout", size))
        self.stderr = Output(self, lambda size: stream.took("stderr", size), over=tty)

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
        """Exit code, 128 + the signal's number when one ended it.

        None while it runs, and for one that was killed because its block was left: nobody heard of its end.
        """
        return self._exited.exit_code if self._exited else None

    @property
    def reason(self) -> Reason | None:
        """Why it ended, as in :class:`Completed`: ``"exit"``, ``"signal"``, ``"oom"`` or ``"vm_died"``.

        None while it runs, and for one that was killed because its block was left: nobody heard of its end.
        """
        if self._exited is not None:
            return reason_of(self._exited)
        return "vm_died" if isinstance(self._running.broken, VMDiedError) else None

    @property
    def signal(self) -> int | None:
        """The signal that ended it; None for another end, and while it runs."""
        return (self._exited.signal or None) if self._exited else None

    @property
    def lost(self) -> ShareLostError | None:
        """Why files of the host were lost that its container had, if they were before it ended.

        It gets I/O errors (ENOTCONN) for them; that it ended well doesn't say that what it wrote there has arrived.
        """
        return self._lost if self.ended else self._running.loss(shared_root=self._shared_root)

    async def communicate(self, input: Buffer | None = None) -> tuple[bytes, bytes]:
        """Send ``input`` and the end of it, take in all output, and wait: ``(stdout, stderr)``.

        All of it is kept in memory, whatever its size; :meth:`Container.run` has a limit.
        """
        data = b"" if input is None else bytes_of(input, "input")
        kept: tuple[list[bytes], list[bytes]] = ([], [])
        async with alongside(self._feed(data)):
            while True:
                for pieces, output in zip(kept, (self.stdout, self.stderr), strict=True):
                    pieces.extend(iter(output.take, b""))
                if self.ended:
                    break
                await self.advance(lambda: self.stdout.waiting or self.stderr.waiting)
        return b"".join(kept[0]), b"".join(kept[1])

    async def _feed(self, data: Buffer) -> None:
        await self.stdin.send(data)
        await self.stdin.aclose()

    async def wait(self) -> int:
        """Wait until it has ended; returns its exit code.

        Output that comes meanwhile is kept for its readers, up to 1 MiB each, or 4 MiB of one that has brought much;
        then the process waits for them.
        """
        while self._exited is None:
            await self.advance(lambda: self.ended)
        return self._exited.exit_code

    async def resize(self, rows: int, cols: int) -> None:
        """Give its terminal another size, of which it hears by SIGWINCH. Nothing happens when it has ended.

        Raises :class:`ConfigError` when it has no terminal.
        """
        check_terminal_size(rows, cols)
        if not self.tty:
            raise ConfigError(f"{self.args[0]!r} has no terminal to resize", hint="start it with tty=True")
        await self._ask(lambda: self._running.agent.resize(*self._identity, rows, cols))

    async def send_signal(self, number: int) -> None:
        """Send a signal to its process group. Nothing happens when it has ended."""
        from pykata.agent.v1 import SignalRequestScope

        await self._signal(check_signal(number), SignalRequestScope.GROUP)

    async def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        await self.send_signal(signals.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL to it and to all its descendants, whatever their group."""
        from pykata.agent.v1 import SignalRequestScope

        try:
            await self._signal(signals.SIGKILL, SignalRequestScope.TREE)
        except AgentTimeoutError as silent:
            # Nothing else can be asked of an agent that doesn't answer this; another wait would only take longer.
            raise await self._running.why(silent) from silent

    async def _signal(self, number: int, scope: SignalRequestScope) -> None:
        await self._ask(lambda: self._running.agent.signal(*self._identity, number, scope))

    async def _ask(self, call: Callable[[], Awaitable[None]]) -> None:
        if not self.ended and not self._left:
            await ask(self._running, call)

    def leave(self) -> None:
        """Its block is left: what runs of it is killed."""
        self._left = True

    async def advance(self, enough: Callable[[], bool]) -> None:
        """Wait until one event from the guest has been taken in, by whomever, unless it is ``enough()`` before.

        Who reads takes in what others wait for, so each event wakes all of them: in a queue, one whose event has come
        would stand behind another that waits for the next.
        """
        if self.ended or enough():
            return
        self._check_open()
        if self._reading:
            await self._news.wait()
            return
        self._reading = True
        try:
            await self._take_one()
        finally:
            self._reading = False
            self._news.set()
            self._news = anyio.Event()

    async def _take_one(self) -> None:
        from pykata.agent.run import Ended, Exited, Room, Stderr, Stdout

        try:
            await self.stdin.catch_up()
            event = await anext(self._stream)
        except AgentLostError as lost:
            raise await self._running.why(lost) from lost
        except AgentRefusedError:
            self._check_open()      # its own end of the call was reset
            raise
        match event:
            case Stdout(data):
                self.stdout.put(data)
                self._running.saw_output()
            case Stderr(data):
                self.stderr.put(data)
                self._running.saw_output()
            case Exited():
                self._lost = self.lost
                self._exited = event
            case Room():
                self.stdin.push()
            case Ended(stdout, stderr):
                self.stdout.end(stdout)
                self.stderr.end(stderr)

    def _check_open(self) -> None:
        if self._left and not self.ended:
            raise SandboxClosedError("this process is gone", hint="use it inside its 'async with' block")


def reason_of(end: End) -> Reason:
    """Why a process ended that the agent told the end of."""
    if end.oom_killed:
        return "oom"
    return "signal" if end.signal else "exit"


async def ask(running: Running, call: Callable[[], Awaitable[None]]) -> None:
    """Ask the agent for something of a process, unless that has ended meanwhile."""
    try:
        async with running.explained():
            await call()
    except AgentRefusedError as refused:
        if refused.status != "NOT_FOUND":       # it has ended, and the news is still on its way
            raise
