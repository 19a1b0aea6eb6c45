"""What every hypervisor offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path

from pykata.errors import ConfigError, VMDiedError
from pykata.spec import Accel, Disk, Features, LentSlot, SavedVM, Transport, VMSpec


class Coming(ABC):
    """A machine that will be saved: what can be done for that while it runs."""

    vm: SavedVM
    """The file that its memory will be in, and the disks that it has now. A machine that waits for its devices can be
    started with it."""

    @property
    @abstractmethod
    def is_current(self) -> bool:
        """Whether the disks are still those: a machine that was started with others can't go on from this."""

    @abstractmethod
    async def begin(self) -> None:
        """Do what is the same however long the machine runs on. Raises :class:`~pykata.errors.VMError`."""

    @abstractmethod
    async def prepare(self) -> None:
        """Do what shall not have to be done while the machine stands still, which it soon will. Raises the same."""


class VM(ABC):
    """A virtual machine that runs. It ends when the context manager that yielded it is left."""

    pid: int
    """The process id of the VMM on the host."""
    accel: Accel
    """What executes the guest's instructions."""
    unsavable: str = "its hypervisor can't save a virtual machine"
    """Why :meth:`saved` doesn't work with it; empty if it does."""
    spawned_at: float
    """``time.monotonic()`` when the VMM's process existed."""
    ready_at: float
    """``time.monotonic()`` when the VMM answered on its control channel."""

    @abstractmethod
    def plug(self, disk: Disk) -> AbstractAsyncContextManager[str]:
        """Attach ``disk``; yields the serial by which the guest finds it. Detached when left.

        Waits while all disk slots are taken. Raises :class:`~pykata.errors.VMError`.
        """

    def lend(self, memory: int, recall: Callable[[], None]) -> AbstractAsyncContextManager[LentSlot | None]:
        """A disk slot that nobody needs, with a memory file in it; detached when left. None: there is none.

        ``recall`` is called when somebody needs it, or nothing may be in it that isn't saved. Raises
        :class:`~pykata.errors.VMError`.
        """
        return nullcontext()

    @abstractmethod
    def console(self) -> str:
        """The end of what the guest wrote to its console, printable, bounded."""

    @abstractmethod
    def end(self, why: VMDiedError) -> None:
        """End it now: something that it needs is gone. :meth:`died` says ``why``, unless it has ended already."""

    @property
    def started_from(self) -> int:
        """Bytes of the saved memory that it goes on from, which saving it begins with; 0 if it was booted."""
        return 0

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended; asked and not awaited, so it may have all the same."""
        return False

    @abstractmethod
    async def died(self) -> VMDiedError:
        """Wait until the virtual machine has ended without being told to; says why. May be called repeatedly."""

    async def pause(self) -> None:
        """Stop the guest's CPUs and timers; its processes notice nothing but the time that is missing."""
        raise ConfigError("this hypervisor can't pause a virtual machine")

    async def resume(self) -> None:
        """Go on after :meth:`pause`. The guest then finds what was written to it before."""
        raise ConfigError("this hypervisor can't pause a virtual machine")

    @asynccontextmanager
    async def coming(self) -> AsyncIterator[Coming]:
        """The beginning of what :meth:`saved` will yield, once and within the block. It runs on."""
        raise ConfigError("this hypervisor can't save a virtual machine")
        yield

    @asynccontextmanager
    async def saved(self, coming: Coming | None = None) -> AsyncIterator[SavedVM]:
        """The machine as it is now, for as long as the block runs. It stands still while it is being saved.

        ``coming`` is what was begun of that before.

        Raises :class:`~pykata.errors.VMError`.
        """
        raise ConfigError("this hypervisor can't save a virtual machine")
        yield


class Hypervisor(ABC):
    """A kind of virtual machine monitor: a frozen value with the options of its kind."""

    @property
    @abstractmethod
    def features(self) -> Features:
        """What it can do; cheap, starts nothing."""

    @abstractmethod
    def accel_here(self) -> Accel:
        """The accelerator that :meth:`boot` will use on this host. Raises :class:`~pykata.errors.HostError`."""

    async def found(self) -> str:
        """What of it is installed, as :func:`~pykata.check` shows it. Raises :class:`~pykata.errors.HostError`."""
        return self.features.name

    def saving(self, identity: Mapping[str, str] | None = None) -> Hypervisor:
        """The same, but so that its machines can be saved, and others go on from them.

        ``identity`` is that of the one whose machine was saved, where there is one.

        Raises :class:`~pykata.errors.ConfigError` that says why that can't be.
        """
        raise ConfigError(f"{self.features.name} can't save a virtual machine")

    def like(self, identity: Mapping[str, str]) -> Hypervisor:
        """The same, but with the machine that ``identity`` is of.

        It may come from a file: raises ConfigError, KeyError or ValueError for what no machine has.
        """
        return self

    def identity(self) -> Mapping[str, str]:
        """What must be the same of the hypervisor and the host for a saved machine to go on here."""
        return {}

    @abstractmethod
    def transport(self, run_dir: Path) -> AbstractAsyncContextManager[Transport]:
        """Open the host's side of the way to the agent."""

    @abstractmethod
    def boot(self, spec: VMSpec, run_dir: Path) -> AbstractAsyncContextManager[VM]:
        """Start a virtual machine; yields as soon as the VMM runs it (the agent may not answer yet).

        Raises :class:`~pykata.errors.BootError` and :class:`~pykata.errors.HostError`.
        """
