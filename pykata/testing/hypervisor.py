"""A hypervisor whose virtual machines are coroutines: no process, no kernel, milliseconds."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import anyio
from attrs import field, frozen

from pykata.concurrency import alongside
from pykata.errors import BootError, GuestPanicError, VMDiedError, VMError
from pykata.hypervisors.base import VM, Hypervisor
from pykata.spec import Accel, Disk, Features, SerialTransport, Transport, VhostFs, VMSpec
from pykata.testing.agent import FakeAgent
from pykata.testing.commands import Command
from pykata.testing.faults import Fault, Moment
from pykata.transport import serial

CONSOLE = "[    0.000000] Linux version 6.12.0-fake\n"
PANIC = "[    0.500000] Kernel panic - not syncing: told to by a test\n"


class FakeVM(VM):
    """A virtual machine that isn't there. ``agent`` is what runs in it, ``plugged`` the disks it has, by serial."""

    def __init__(self, spec: VMSpec, hypervisor: FakeHypervisor) -> None:
        self.pid = os.getpid()
        self.accel = hypervisor.accel
        self.spawned_at = self.ready_at = time.monotonic()
        self.spec = spec
        self.agent = FakeAgent(
            hypervisor.commands, disks=set(), before_call=self._before_call, tool=hypervisor.tool,
            shares={device.tag for device in spec.devices if isinstance(device, VhostFs)},
        )  # fmt: skip
        self.plugged: dict[str, Disk] = {}
        self._faults = hypervisor.faults
        self._slots = anyio.Semaphore(hypervisor.disk_slots)
        self._serials = count(1)
        self._console = CONSOLE
        self._end: VMDiedError | None = None
        self._ended = anyio.Event()
        self._power = anyio.CancelScope()       # cancelled: switched off

    @asynccontextmanager
    async def plug(self, disk: Disk) -> AsyncIterator[str]:
        async with self._slots:
            await self.reach("plug")
            self._check()
            serial = f"fake{next(self._serials)}"
            self.plugged[serial] = disk
            self.agent.disks = set(self.plugged)
            try:
                yield serial
            finally:
                del self.plugged[serial]
                self.agent.disks = set(self.plugged)
            await self.reach("unplug")

    def console(self) -> str:
        return self._console

    async def died(self) -> VMDiedError:
        await self._ended.wait()
        assert self._end is not None
        return self._end

    def end(self, why: VMDiedError) -> None:
        self._stop(why)

    def die(self) -> None:
        """End as if the VMM had been killed."""
        self._stop(VMDiedError("the virtual machine was killed by SIGKILL", console=self._console))

    def panic(self) -> None:
        """End as if the guest's kernel had panicked."""
        self._console += PANIC
        self._stop(GuestPanicError("the guest's kernel panicked: told to by a test", console=self._console))

    async def reach(self, moment: Moment) -> None:
        """Something is about to happen: fail now, if this is when the machine shall."""
        match self._faults.get(moment):
            case "die":
                self.die()
            case "panic":
                self.panic()
            case "hang":
                await anyio.sleep_forever()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs while the block does."""
        assert isinstance(self.spec.transport, SerialTransport)
        with self.spec.transport.vmm.dup() as port:     # as a process inherits it
            self.spec.transport.vmm.close()
            async with alongside(self._live(port)):
                yield

    async def _live(self, port: socket.socket) -> None:
        with port, self._power:
            await self.reach("boot")
            await self.agent.serve(port)
            await anyio.sleep_forever()         # the guest stays up when the host hangs up

    async def _before_call(self, name: Moment) -> None:
        await self.reach(name)
        if self._end is not None:
            await anyio.sleep_forever()         # which is cut short: this runs in the machine

    def _check(self) -> None:
        if self._end is not None:
            raise VMError(f"the virtual machine has ended: {self._end.message}", console=self._console)

    def _stop(self, why: VMDiedError) -> None:
        if self._end is None:
            self._end = why
            self._ended.set()
            self._power.cancel()


@frozen
class FakeHypervisor(Hypervisor):
    """Boots virtual machines that aren't there, with a :class:`FakeAgent` in each::

        hypervisor = FakeHypervisor(commands={"greet": greet}, faults={"Run": "panic"})
        async with Sandbox(hypervisor, FakeFs()) as sb:
            ...

    ``commands`` are programs beside the built-in ones, ``tool`` is the agent's own for files. ``faults`` say when the
    machines fail, and how; to fail at another time, call :meth:`FakeVM.die` or :meth:`FakeVM.panic` of one in
    ``machines``, all that were booted.
    """

    commands: Mapping[str, Command] = field(factory=dict)
    faults: Mapping[Moment, Fault] = field(factory=dict)
    accel: Accel = "kvm"
    disk_slots: int = 4
    tool: Command | None = None
    machines: list[FakeVM] = field(factory=list, init=False, eq=False, repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        """To be handed to the keeper of a detached sandbox, whose machines are its own."""
        return FakeHypervisor, (self.commands, self.faults, self.accel, self.disk_slots)

    @property
    def features(self) -> Features:
        return Features(
            name="fake", disk_slots=self.disk_slots, filesystems=("fake",), networks=("none",), max_cpus=64
        )

    def accel_here(self) -> Accel:
        return self.accel

    @asynccontextmanager
    async def transport(self, run_dir: Path) -> AsyncIterator[Transport]:
        with serial() as transport:
            yield transport

    @asynccontextmanager
    async def boot(self, spec: VMSpec, run_dir: Path) -> AsyncIterator[VM]:
        if self.faults.get("boot") == "die":
            raise BootError("the VMM ended before it ran the guest: told to by a test")
        vm = FakeVM(spec, self)
        self.machines.append(vm)
        async with vm.running():
            yield vm
