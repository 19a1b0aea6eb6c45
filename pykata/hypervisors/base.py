"""What every hypervisor offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pykata.errors import VMDiedError
from pykata.spec import Accel, Disk, Features, Transport, VMSpec


class VM(ABC):
    """A virtual machine that runs. It ends when the context manager that yielded it is left."""

    pid: int
    """The process id of the VMM on the host."""
    accel: Accel
    """What executes the guest's instructions."""
    spawned_at: float
    """``time.monotonic()`` when the VMM's process existed."""
    ready_at: float
    """``time.monotonic()`` when the VMM answered on its control channel."""

    @abstractmethod
    def plug(self, disk: Disk) -> AbstractAsyncContextManager[str]:
        """Attach ``disk``; yields the serial by which the guest finds it. Detached when left.

        Waits while all disk slots are taken. Raises :class:`~pykata.errors.VMError`.
        """

    @abstractmethod
    def console(self) -> str:
        """The end of what the guest wrote to its console, printable, bounded."""

    @abstractmethod
    async def died(self) -> VMDiedError:
        """Wait until the virtual machine has ended without being told to; says why. May be called repeatedly."""


class Hypervisor(ABC):
    """A kind of virtual machine monitor: a frozen value with the options of its kind."""

    @property
    @abstractmethod
    def features(self) -> Features:
        """What it can do; cheap, starts nothing."""

    @abstractmethod
    def accel_here(self) -> Accel:
        """The accelerator that :meth:`boot` will use on this host. Raises :class:`~pykata.errors.HostError`."""

    @abstractmethod
    def transport(self, run_dir: Path) -> AbstractAsyncContextManager[Transport]:
        """Open the host's side of the way to the agent."""

    @abstractmethod
    def boot(self, spec: VMSpec, run_dir: Path) -> AbstractAsyncContextManager[VM]:
        """Start a virtual machine; yields as soon as the VMM runs it (the agent may not answer yet).

        Raises :class:`~pykata.errors.BootError` and :class:`~pykata.errors.HostError`.
        """
