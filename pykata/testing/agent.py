"""An agent in memory that keeps to agent.proto: containers and processes are only bookkeeping, programs coroutines."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from typing import TypeVar

import anyio
import betterproto2
from anyio.abc import TaskGroup
from attrs import define, field

from pykata.agent import v1
from pykata.agent.server import Call, Handler, serve
from pykata.concurrency import alongside
from pykata.errors import AgentRefusedError
from pykata.spec import Terminal
from pykata.testing.commands import BUILTINS, Command
from pykata.testing.faults import Moment
from pykata.testing.files import FakeFiles
from pykata.testing.process import FakeProcess

IDENTIFIER = re.compile(r"[a-z0-9-]{1,64}")
MEMORY = 256 * 1024 * 1024

_Message = TypeVar("_Message", bound=betterproto2.Message)


@define(eq=False)
class FakeDetached:
    """A process that outlives its call, and what is kept of it."""

    process: FakeProcess
    most: int
    written: int = 0
    log: bytes = b""
    over: anyio.Event = field(factory=anyio.Event)

    def keep(self, data: bytes) -> None:
        self.written += len(data)
        self.log = (self.log + data)[-self.most :] if self.most else b""


@define(eq=False)
class FakeContainer:
    """A container of the fake agent: the request that made it, and the processes that run, by id."""

    request: v1.CreateContainerRequest
    processes: dict[str, FakeProcess] = field(factory=dict)
    files: FakeFiles = field(factory=FakeFiles)
    detached: dict[str, FakeDetached] = field(factory=dict)
    pids: Iterator[int] = field(factory=lambda: count(2))


@define(eq=False)
class FakeAgent:
    """A guest's agent without a guest. ``commands`` are programs beside the built-in ones, by ``args[0]``::

        async def greet(process):
            await process.write(b"hello " + await process.read())
            return 0

        async with FakeAgent({"greet": greet}).connected() as sock, connect(sock) as agent:
            await agent.setup(SetupRequest(hostname="guest"))

    ``requests`` is every request that arrived, in order. ``disks`` are the serials of the disks that are plugged in; a
    rootfs on any other one is refused. None stands for a guest that has them all. ``before_call`` is awaited with the
    name of each call as it arrives, and with ``"removal"`` when a container goes that was one command's. ``tool`` runs
    in place of :class:`FakeFiles`, for files. ``shares`` are the tags of the virtio-fs devices, and ``aborted`` those
    whose server was said to be gone.
    """

    commands: Mapping[str, Command] = field(factory=dict)
    disks: set[str] | None = None
    before_call: Callable[[Moment], Awaitable[None]] | None = None
    tool: Command | None = None
    shares: set[str] = field(factory=set)
    requests: list[betterproto2.Message] = field(factory=list, init=False)
    aborted: list[str] = field(factory=list, init=False)
    setup: v1.SetupRequest | None = field(default=None, init=False)
    containers: dict[str, FakeContainer] = field(factory=dict, init=False)
    _background: TaskGroup = field(init=False)
    _started: int = field(factory=time.monotonic_ns, init=False)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[socket.socket]:
        """Serve until the context is left; yields the host's end of the connection."""
        host, guest = socket.socketpair()
        with host, guest:
            async with alongside(self.serve(guest)):
                yield host

    async def serve(self, sock: socket.socket) -> None:
        """Serve one connection until the host ends it. What was detached ends with it."""
        calls: dict[Moment, Handler] = {
            "Setup": self._setup,
            "CreateContainer": self._create_container,
            "RemoveContainer": self._remove_container,
            "Signal": self._signal,
            "Resize": self._resize,
            "Inspect": self._inspect,
            "AbortShare": self._abort_share,
            "Stats": self._stats,
            "Run": self._run,
        }
        async with anyio.create_task_group() as self._background:
            await serve(sock, {name: self._announced(name, handler) for name, handler in calls.items()})
            self._background.cancel_scope.cancel()

    def _announced(self, name: Moment, handler: Handler) -> Handler:
        async def call(call: Call) -> None:
            if self.before_call:
                await self.before_call(name)
            await handler(call)

        return call

    def program(self, name: str) -> Command | None:
        """What runs as ``name``; paths are looked up by their last part."""
        base = name.rsplit("/", 1)[-1]
        return self.commands.get(name) or self.commands.get(base) or BUILTINS.get(base)

    async def _setup(self, call: Call) -> None:
        request = await self._request(call, v1.SetupRequest)
        if self.setup is not None:
            raise refused("FAILED_PRECONDITION", "Setup was called before")
        if len(request.entropy) < 32:
            raise refused("INVALID_ARGUMENT", f"entropy: {len(request.entropy)} bytes")
        self.setup = request
        now = time.monotonic_ns() - self._started
        answer = v1.SetupResponse(
            agent_version="0.0.0", kernel_release="fake", now_ns=now, agent_ns=now,
            memory_total=MEMORY, memory_available=MEMORY,
        )  # fmt: skip
        await call.send(bytes(answer))

    async def _create_container(self, call: Call) -> None:
        self._create(await self._request(call, v1.CreateContainerRequest))
        await call.send(bytes(v1.CreateContainerResponse()))

    def _create(self, request: v1.CreateContainerRequest) -> FakeContainer:
        self._check_set_up()
        check_id("id", request.id)
        if request.id in self.containers:
            raise refused("ALREADY_EXISTS", f"container {request.id}")
        if request.rootfs is None or not request.rootfs.lowers:
            raise refused("INVALID_ARGUMENT", "rootfs: no lowers")
        for mount in request.rootfs.lowers:
            if mount.disk_serial is not None and self.disks is not None and mount.disk_serial not in self.disks:
                raise refused("INVALID_ARGUMENT", f"rootfs: there is no disk {mount.disk_serial}")
        container = FakeContainer(request)
        self.containers[request.id] = container
        return container

    async def _remove_container(self, call: Call) -> None:
        request = await self._request(call, v1.RemoveContainerRequest)
        self._check_set_up()
        await self._remove(request.id)
        await call.send(bytes(v1.RemoveContainerResponse()))

    async def _remove(self, container_id: str) -> None:
        container = self.containers.pop(container_id, None)
        for process in list(container.processes.values()) if container else ():
            process.kill(signal.SIGKILL)
            await process.gone()

    async def _signal(self, call: Call) -> None:
        request = await self._request(call, v1.SignalRequest)
        container = self._container(request.container_id)
        process = container.processes.get(request.process_id)
        if process is None:
            raise refused("NOT_FOUND", f"process {request.process_id}")
        if not 0 <= request.signal <= 64:
            raise refused("INVALID_ARGUMENT", f"signal: {request.signal}")
        if request.scope == v1.SignalRequestScope.TREE and request.signal != signal.SIGKILL:
            raise refused("INVALID_ARGUMENT", "scope: TREE is for SIGKILL only")
        process.kill(request.signal)
        await call.send(bytes(v1.SignalResponse()))

    async def _resize(self, call: Call) -> None:
        request = await self._request(call, v1.ResizeRequest)
        process = self._container(request.container_id).processes.get(request.process_id)
        if process is None:
            raise refused("NOT_FOUND", f"process {request.process_id}")
        if process.terminal is None or request.terminal is None:
            raise refused("FAILED_PRECONDITION", f"process {request.process_id}: has no terminal")
        process.terminal = Terminal(request.terminal.rows, request.terminal.cols)
        process.kill(signal.SIGWINCH)
        await call.send(bytes(v1.ResizeResponse()))

    async def _inspect(self, call: Call) -> None:
        request = await self._request(call, v1.InspectRequest)
        known = self._container(request.container_id).detached.get(request.process_id)
        if known is None:
            raise refused("NOT_FOUND", f"process {request.process_id}")
        if request.wait:
            await known.over.wait()
        end = known.process.end if known.over.is_set() else None
        await call.send(bytes(v1.InspectResponse(exited=end, log=known.log, written=known.written)))

    async def _abort_share(self, call: Call) -> None:
        request = await self._request(call, v1.AbortShareRequest)
        self._check_set_up()
        if request.tag not in self.shares:
            raise refused("NOT_FOUND", f"tag: no shared directory {request.tag}")
        self.aborted.append(request.tag)
        await call.send(bytes(v1.AbortShareResponse()))

    async def _stats(self, call: Call) -> None:
        await self._request(call, v1.StatsRequest)
        self._check_set_up()
        containers = {name: v1.ContainerStats(pids=1 + len(c.processes)) for name, c in self.containers.items()}
        await call.send(bytes(v1.StatsResponse(
            memory_total=MEMORY, memory_available=MEMORY, open_files=8, containers=containers,
            now_ns=time.monotonic_ns() - self._started,
        )))  # fmt: skip

    async def _run(self, call: Call) -> None:
        start = (await self._request(call, v1.RunRequest)).start
        if start is None or start.process is None or bool(start.process.args) == bool(start.process.tool):
            raise refused("INVALID_ARGUMENT", "the first request of Run has no command, or two")
        if start.create is not None:
            if start.create.id != start.container_id:
                raise refused("INVALID_ARGUMENT", f"create.id: {start.create.id}, not {start.container_id}")
            self._create(start.create)
        own = start.create is not None or start.last
        try:
            await self._run_in(self._container(start.container_id), start, start.process, call)
            if own and start.lingers:
                await farewell(call)
            if own and self.before_call:
                await self.before_call("removal")
        finally:
            if own:
                self.containers.pop(start.container_id, None)

    async def _run_in(self, container: FakeContainer, start: v1.Start, request: v1.Process, call: Call) -> None:
        check_id("process.id", request.id)
        if request.id in container.processes:
            raise refused("ALREADY_EXISTS", f"process {request.id}")
        process = container.processes[request.id] = new_process(container, request)
        served = self.tool or container.files.serve
        program = (self.program(process.args[0]) if process.args else served) or not_found
        if start.detached:
            self._background.start_soon(self._run_detached, container, request.id, process, program, start.log)
            await call.send(bytes(v1.RunResponse(started=v1.Started(pid=process.pid))))
            return
        try:
            await process.run(call, start, program)
        finally:
            container.processes.pop(request.id, None)

    async def _run_detached(
        self, container: FakeContainer, name: str, process: FakeProcess, program: Command, log: int
    ) -> None:
        known = container.detached[name] = FakeDetached(process, log)
        try:
            await process.run_detached(program, known.keep)
        finally:
            known.over.set()
            container.processes.pop(name, None)

    def _container(self, container_id: str) -> FakeContainer:
        self._check_set_up()
        if container_id not in self.containers:
            raise refused("NOT_FOUND", f"container {container_id}")
        return self.containers[container_id]

    def _check_set_up(self) -> None:
        if self.setup is None:
            raise refused("FAILED_PRECONDITION", "Setup wasn't called yet")

    async def _request(self, call: Call, kind: type[_Message]) -> _Message:
        request = kind.parse(await call.receive() or b"")
        self.requests.append(request)
        return request


def new_process(container: FakeContainer, request: v1.Process) -> FakeProcess:
    """A process with what its container and the request say together."""
    usual = container.request.usual or v1.Usual()
    env = dict(pair.partition("=")[::2] for pair in [*usual.env, *request.env])
    return FakeProcess(
        args=tuple(request.args), env=env, cwd=request.cwd or usual.cwd or "/", user=request.user,
        pid=next(container.pids),
        terminal=Terminal(request.terminal.rows or 24, request.terminal.cols or 80) if request.terminal else None,
        rlimits={limit.type: (limit.soft, limit.hard) for limit in request.rlimits},
    )  # fmt: skip


async def farewell(call: Call) -> None:
    """Wait until the host wants the container of a process that has ended to go."""
    while (data := await call.receive()) is not None and not v1.RunRequest.parse(data).remove:
        pass


async def not_found(process: FakeProcess) -> int:
    """What runs in place of a program that doesn't exist."""
    await process.write_error(f"{process.args[0] if process.args else 'tool'}: not found\n".encode())
    return 127


def check_id(field_name: str, value: str) -> None:
    if not IDENTIFIER.fullmatch(value):
        raise refused("INVALID_ARGUMENT", f"{field_name}: {value!r}")


def refused(status: str, message: str) -> AgentRefusedError:
    return AgentRefusedError(message, status=status)
