"""A virtual machine of QEMU: started, watched and ended."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
)
from pathlib import Path

import anyio

from pykata import host
from pykata.errors import (
    BootError,
    BootTimeoutError,
    GuestPanicError,
    HostError,
    NotPermittedError,
    PykataError,
    VMDiedError,
    last_line,
)
from pykata.hypervisors import base
from pykata.hypervisors.base import VM
from pykata.hypervisors.qemu import accel as accels
from pykata.hypervisors.qemu import aio as aios
from pykata.hypervisors.qemu import state, version
from pykata.hypervisors.qemu.aio import Aio
from pykata.hypervisors.qemu.command import Descriptors, Machine, command
from pykata.hypervisors.qemu.console import Followed, Tail
from pykata.hypervisors.qemu.qmp import QMP, QMPClosedError
from pykata.hypervisors.qemu.slots import Slots
from pykata.spec import (
    MIB,
    Accel,
    Disk,
    LentSlot,
    Nic,
    NineP,
    Pmem,
    SavedVM,
    SerialTransport,
    VhostFs,
    VhostNet,
    VMSpec,
    place_of,
)

log = logging.getLogger(__name__)

# What QEMU says whenever a fork's guest has freed memory: that it can't free it in the sealed file that all forks map.
KNOWN = "ram_block_discard_"
LAST_WORDS = 2.0        # seconds that the pipes of a QEMU that has ended may take to be read to their end


class QemuVM(VM):
    """A running QEMU."""

    def __init__(
        self, process: host.HostProcess, accel: Accel, control: socket.socket, spec: VMSpec, slots: int, aio: Aio
    ) -> None:
        self.pid = process.pid
        self.accel = accel
        self.spawned_at = time.monotonic()
        self.ready_at = self.spawned_at
        self._process = process
        self._console = Tail()
        self._complaints = Tail(host.TAIL)
        self._events: dict[str, Mapping[str, object]] = {}
        self._qmp = QMP(control, self._note)
        self._slots = Slots(self._qmp, slots, spec.saved.slots if spec.saved else {}, aio)
        self.unsavable = _why_unsavable(accel, spec)
        self._memory = spec.memory * MIB
        # Of its own: this machine may outlive what it was started from, and be saved in turn.
        self._started_from = os.dup(spec.saved.memory) if spec.saved else None
        self._paused = spec.paused
        assert process.stdout is not None
        assert process.stderr is not None
        self._followed = Followed(process.stdout, self._console), Followed(process.stderr, self._complaints)
        self._stopped = False
        self._why: VMDiedError | None = None

    def plug(self, disk: Disk) -> AbstractAsyncContextManager[str]:
        return self._slots.plug(disk)

    def lend(self, memory: int, recall: Callable[[], None]) -> AbstractAsyncContextManager[LentSlot | None]:
        return self._slots.lend(memory, recall)

    def console(self) -> str:
        return self._console.text()

    def complaints(self) -> str:
        """The end of what QEMU has written to its stderr that isn't known to be harmless."""
        return "\n".join(line for line in self._complaints.text().splitlines() if KNOWN not in line)

    async def pause(self) -> None:
        self._paused = True
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        # An answer says that QEMU has looked at all its sockets: what was written to the guest before is there by now.
        await self._qmp.execute("query-status")
        await self._qmp.execute("cont")
        self._paused = False

    @asynccontextmanager
    async def coming(self) -> AsyncIterator[state.Coming]:
        with host.memory_file(self._memory) as memory, host.held(memory) as file:
            # Of its own, as this machine may be left meanwhile.
            started_from = None if self._started_from is None else os.dup(self._started_from)
            with closing(state.Copy(self.pid, self._memory, started_from, memory)) as copy:
                yield state.Coming(SavedVM(file, b"", self._slots.now()), copy, self._slots.now)

    @asynccontextmanager
    async def saved(self, coming: base.Coming | None = None) -> AsyncIterator[SavedVM]:
        async with AsyncExitStack() as stack:
            begun = coming or await stack.enter_async_context(self.coming())
            assert isinstance(begun, state.Coming)
            async with self._slots.still() as slots:
                with closing(begun.copy):
                    await begun.prepare()
                    devices = await self._save(begun)
            # After it was mapped, too: what is private stays allowed.
            host.seal(begun.vm.memory)
            yield SavedVM(begun.vm.file, devices, slots)

    async def _save(self, coming: state.Coming) -> bytes:
        """Finish the copy of the guest's memory; returns the state of the devices. The machine is stopped for that."""
        was_paused = self._paused
        try:
            if not was_paused:
                await self.pause()
            devices = await state.devices(self._qmp)
            await coming.finish()
            return devices
        finally:
            if not was_paused:
                await host.finish(self.resume())

    def end(self, why: VMDiedError) -> None:
        if self._process.returncode is None and self._why is None:
            self._why = why
            self._process.kill()

    @property
    def started_from(self) -> int:
        return 0 if self._started_from is None else os.fstat(self._started_from).st_blocks * 512

    @property
    def has_ended(self) -> bool:
        return self._process.has_ended()

    async def died(self) -> VMDiedError:
        await self._ended()
        code = self._process.returncode
        console = self.console()
        if self._why is not None:
            self._why.console = console
            return self._why
        if self._stopped:
            return VMDiedError("the virtual machine was stopped", console=console)
        if "STOP" in self._events:
            return VMDiedError("QEMU could not run the machine any further", console=console)
        if code:
            hint = "the host's kernel kills what it has no memory for" if code == -signal.SIGKILL else ""
            return VMDiedError(f"QEMU {self._how()}", console=console, hint=hint)
        if (panic := self._console.panic()) is not None:
            return GuestPanicError(f"the guest's kernel panicked: {panic}", console=console)
        reason = self._events.get("SHUTDOWN", {}).get("reason", "for no known reason")
        return VMDiedError(f"the guest switched its machine off ({reason})", console=console)

    async def ready(self, binary: Path) -> None:
        """Wait until QEMU answers on its control channel. The guest runs already. Raises BootError."""
        try:
            greeting = await self._qmp.negotiate()
        except QMPClosedError as exc:
            self._process.kill()        # one that closed its control channel and runs on is of no use
            await self._ended()
            version.check(await version.of_binary(binary), binary)
            raise BootError(f"before it answered, QEMU {self._how()}", console=self.console()) from exc
        version.check(version.of_greeting(greeting), binary)
        self.ready_at = time.monotonic()

    def stop(self) -> None:
        """Let go of everything but the process. Nothing is asked of QEMU: it holds no state that must be saved."""
        self._stopped = True
        if self._started_from is not None:
            os.close(self._started_from)
            self._started_from = None
        self._process.kill()
        self._qmp.close()
        for pipe in self._followed:
            pipe.close()

    async def _ended(self) -> None:
        """Wait until QEMU has ended and all that it said is read: then it is known why."""
        await self._process.wait()
        with anyio.move_on_after(LAST_WORDS):
            for pipe in self._followed:
                await pipe.ended.wait()
            await self._qmp.closed()

    def _how(self) -> str:
        """How QEMU ended, and what it said last."""
        how = host.describe_exit(self._process.returncode or 0)
        return f"{how}: {said}" if (said := last_line(self.complaints())) else how

    def _note(self, name: str, data: Mapping[str, object]) -> None:
        log.debug("QEMU %d: %s %s", self.pid, name, data)
        if name == "SHUTDOWN":
            self._events[name] = data
        elif name == "STOP" and "SHUTDOWN" not in self._events and not self._paused:
            # Nobody asked it to: KVM met an instruction that it can't emulate, say. It would stay like that for ever.
            self._events[name] = data
            self._process.kill()


def _why_unsavable(accel: Accel, spec: VMSpec) -> str:
    if accel != "tcg":
        return "hardware runs it, and only emulated guests can be saved"
    if not isinstance(spec.transport, SerialTransport):
        return 'its agent isn\'t on a serial port, as with QEMU(agent="serial")'
    # Another machine couldn't have the same disks, nics and shared directories, nor QEMU save all of them.
    return "it has disks, interfaces or directories of the host" if spec.devices else ""


@asynccontextmanager
async def start(
    binary: Path, machine: Machine, accel: Accel, spec: VMSpec, *, slots: int, reclaim: bool, ksm: bool, code_cache: int
) -> AsyncIterator[QemuVM]:
    """Run a virtual machine for as long as the block runs. The guest boots while QEMU sets up its control channel."""
    async with AsyncExitStack() as stack:
        try:
            vm = await _started(
                stack, binary, machine, accel, spec, slots=slots, reclaim=reclaim, ksm=ksm, code_cache=code_cache
            )
        except PykataError:
            raise
        except OSError as exc:      # no descriptors are left, say
            raise HostError(f"can't start a virtual machine: {exc}") from exc
        yield vm


async def _started(
    stack: AsyncExitStack, binary: Path, machine: Machine, accel: Accel, spec: VMSpec, *,
    slots: int, reclaim: bool, ksm: bool, code_cache: int,
) -> QemuVM:  # fmt: skip
    """A machine whose QEMU answers. What belongs to it is on the ``stack``."""
    khz = accels.tsc_khz() if accel == "tcg" else None
    aio = aios.choose(binary)
    groups = accels.kvm_groups() if accel == "kvm" else ()
    identity = stack.enter_context(host.ephemeral_identity(groups=groups))
    lent = await stack.enter_async_context(_lent(spec, identity))
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    incoming, devices = None, spec.saved.stream if spec.saved else None
    if spec.saved and devices is None:
        incoming = stack.enter_context(closing(state.Incoming(spec.saved.devices)))
        devices = incoming.theirs
    with theirs, _descriptors(spec, theirs.fileno(), lent, devices) as given:
        argv = command(
            binary, machine, accel, spec, given,
            slots=slots, reclaim=reclaim, ksm=ksm, code_cache=code_cache, tsc_khz=khz, aio=aio,
        )  # fmt: skip
        through = [word for nic in spec.devices if isinstance(nic, Nic) for word in nic.through]
        # Translated code is most of what one that goes on from a saved one has of its own, and QEMU asks for huge pages
        # for it: 2 MiB more for each, and no faster.
        small = accel == "tcg" and spec.saved is not None
        # Killed, not asked: no disk of ours has a write cache, and nobody waits for a guest to shut down.
        spawned = host.spawn(argv, stdout=host.PIPE, stderr=host.PIPE, pass_fds=given.all(), cwd=Path("/"),
                             identity=identity, through=through, small_pages=small, quick=True,
                             kill=host.KILL)
        process = await stack.enter_async_context(spawned)
    # Else our own copy would keep the stream open when QEMU ends.
    (spec.transport.vmm if isinstance(spec.transport, SerialTransport) else spec.transport.device).close()
    for share in spec.devices:
        if isinstance(share, VhostFs):
            share.connection.close()
    vm = QemuVM(process, accel, ours, spec, slots, aio)
    stack.callback(vm.stop)
    with anyio.move_on_after(spec.boot_timeout) as patience:
        if incoming is not None:
            if spec.saved and spec.saved.whole:
                await spec.saved.whole()        # meanwhile QEMU starts, and looks at no memory before it has this
            await incoming.send()
        await vm.ready(binary)
    if patience.cancelled_caught:
        raise BootTimeoutError(f"QEMU didn't answer within {spec.boot_timeout:g} s", console=vm.console())
    return vm


@asynccontextmanager
async def _lent(spec: VMSpec, identity: host.Identity | None) -> AsyncIterator[tuple[int, ...]]:
    """A descriptor of each directory that QEMU itself shares, with which it may do what its owner may."""
    async with AsyncExitStack() as stack:
        shares = [share for share in spec.devices if isinstance(share, NineP)]
        yield tuple([
            await stack.enter_async_context(host.lent_directory(share.path, identity, readonly=share.readonly))
            if share.descriptor is None else share.descriptor
            for share in shares
        ])  # fmt: skip


@contextmanager
def _descriptors(
    spec: VMSpec, control: int, lent: tuple[int, ...], devices: socket.socket | None
) -> Iterator[Descriptors]:
    """Open everything that QEMU gets. It has its own copies once it is spawned, so ours are closed then."""
    with ExitStack() as stack:
        def opened(path: Path, flags: int = os.O_RDONLY) -> int:
            try:
                descriptor = os.open(path, flags | os.O_CLOEXEC)
            except OSError as exc:
                raise HostError(f"can't open {path} for the virtual machine: {exc.strerror}") from exc
            stack.callback(os.close, descriptor)
            return descriptor

        transport = spec.transport
        yield Descriptors(
            start=(_memory(stack, spec.saved), devices.fileno()) if spec.saved and devices else (
                _reopenable(stack, opened(spec.kernel)), _reopenable(stack, opened(spec.initrd)),
            ),
            control=control,
            agent=(transport.vmm if isinstance(transport, SerialTransport) else transport.device).fileno(),
            disks=tuple(
                tuple(opened(place_of(disk), flags) for flags in _flags(disk))
                for disk in spec.devices if isinstance(disk, Disk)
            ),
            shares=tuple(share.connection.fileno() for share in spec.devices if isinstance(share, VhostFs)),
            directories=lent,
            mapped=tuple(_mappable(opened(place_of(one)), one) for one in spec.devices if isinstance(one, Pmem)),
            nics=(
                *(fd for nic in spec.devices if isinstance(nic, Nic) for fd in nic.fds),
                *(nic.place for nic in spec.devices if isinstance(nic, VhostNet)),
            ),
            slots={number: opened(disk.path) for number, disk in (spec.saved.slots if spec.saved else {}).items()},
        )  # fmt: skip


def _flags(disk: Disk) -> tuple[int, ...]:
    """QEMU opens a writable image read-only first, and a set must have a descriptor of each kind."""
    return (os.O_RDONLY,) if disk.readonly else (os.O_RDONLY, os.O_RDWR)


def _mappable(descriptor: int, mapped: Pmem) -> int:
    """QEMU opens it again by ``/proc/self/fd/N``, as its own user: so the file's own mode counts."""
    if os.geteuid() == 0 and not os.fstat(descriptor).st_mode & stat.S_IROTH:
        raise NotPermittedError(f"QEMU, which runs as nobody, may not read {mapped.path}", hint="chmod o+r")
    return descriptor


def _memory(stack: ExitStack, saved: SavedVM) -> int:
    """Of our own: it may be left, and its number be another file's, before QEMU is spawned."""
    memory = os.dup(saved.memory)
    stack.callback(os.close, memory)
    return memory


def _reopenable(stack: ExitStack, descriptor: int) -> int:
    """A descriptor that QEMU can open again as ``/proc/self/fd/N``, which is how it loads a kernel.

    That ignores the directories above the file, but not the file's own mode. One that only root may read is copied.
    """
    if os.geteuid() != 0 or os.fstat(descriptor).st_mode & stat.S_IROTH:
        return descriptor
    copy = os.memfd_create("pykata", os.MFD_CLOEXEC)
    stack.callback(os.close, copy)
    while os.sendfile(copy, descriptor, None, 1 << 30):
        pass
    return copy
