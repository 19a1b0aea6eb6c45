"""Booting: everything between a sandbox's options and a guest that takes containers."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
from attrs import evolve, frozen

from pykata.admission import BOOTED, RESTORED, admitted
from pykata.concurrency import alongside
from pykata.errors import AgentError, BootError, BootTimeoutError, SandboxClosedError, VMDiedError, VMError
from pykata.guest import Bundle, find_bundle, in_use
from pykata.host import run_dir
from pykata.hypervisors.base import VM
from pykata.isolation import check_here
from pykata.lost import ended_with, explained, outliving
from pykata.net.names import servers_for_guests
from pykata.net.running import RunningNetwork
from pykata.options import Options
from pykata.removals import in_background
from pykata.running import DEATH_NOTICE, Running
from pykata.spec import MIB, Attachment, SavedVM, Timings, Transport, VMSpec
from pykata.transport import connect
from pykata.volumes import FsspecVolume
from pykata.waiting import expecting

if TYPE_CHECKING:
    from pykata.agent.client import AgentClient
    from pykata.agent.v1 import SetupResponse

SPARE_MEMORY = 16 * MIB
"""What containers leave to the guest's kernel and agent, so that a greedy one meets its own limit first."""


Talked = TypeVar("Talked")


class TemplateWarning(UserWarning):
    """A template in the cache was of no use and was removed, or none can be kept; the sandbox boots."""


@asynccontextmanager
async def boot(options: Options) -> AsyncIterator[Running]:
    """Start a virtual machine; yields when its agent is ready. Undone in reverse order, also when it fails half-way.

    It is booted, or goes on from one that was saved.
    """
    begun = Begun(options, time.monotonic())
    check_here(options)
    async with AsyncExitStack() as stack:
        if options.spares is not None:
            stack.enter_context(options.spares.replacing())
        running = await _started(stack, begun)
        await stack.enter_async_context(in_background(running))
        if not options.bare:
            await stack.enter_async_context(expecting(running))
        try:
            yield running
        finally:
            # What another task still does in it ends with this rather than with the connection's end.
            running.is_left = True
            running.broken = SandboxClosedError("this sandbox was left", hint="use it inside its 'async with' block")
            # Nothing is asked of its guest any more. One that runs on until the rest is undone would execute, for the
            # first time, what there is to do when the connection ends.
            running.vm.end(VMDiedError("the sandbox was left"))


@frozen
class Begun:
    """A sandbox that is being entered, and when that began."""

    options: Options
    entered: float
    why: str = ""       # not from a template


async def _started(stack: AsyncExitStack, begun: Begun) -> Running:
    options = begun.options
    if options.template == "off" and options.origin is None and options.snapshot is None:
        return await booted(stack, begun)
    from pykata import restore  # who boots doesn't need it

    return await restore.started(stack, begun)


async def booted(stack: AsyncExitStack, begun: Begun) -> Running:
    """Boot a machine; what belongs to it is on the ``stack``."""
    machine = await attached(stack, begun.options)

    async def talk(vm: VM) -> tuple[AgentClient, SetupResponse]:
        agent = await stack.enter_async_context(connected(vm, await _dialled(vm, machine.spec.transport)))
        answer = await set_up(vm, agent, begun.options, machine.attachment)
        await stack.enter_async_context(_serving(agent, begun.options))
        return agent, answer

    slot, vm, (agent, answer) = await up(stack, begun.options, machine, talk)
    running = Running(
        options=begun.options, bundle=machine.bundle, run_dir=machine.directory, vm=vm, agent=agent,
        memory_limit=memory_limit(answer), entered=begun.entered, timings=_timings(begun, slot, vm, answer),
        network=RunningNetwork.of(machine.attachment),
    )  # fmt: skip
    await stack.enter_async_context(outliving(running, machine.attachment.served))
    return running


@frozen
class Machine:
    """All that a machine needs before it is started."""

    directory: Path
    bundle: Bundle
    attachment: Attachment
    spec: VMSpec
    vm: VM | None = None                # one that was started before it was known for whom
    agent: AgentClient | None = None    # in it, if it doesn't stand still
    rehearsed: bool = False             # the way of a first command


async def attached(
    stack: AsyncExitStack, options: Options, saved: SavedVM | None = None, *,
    bundle: Bundle | None = None, paused: bool = False,
) -> Machine:  # fmt: skip
    """Run directory, network, shared files and transport, on the ``stack``; or a machine that has all that."""
    if saved is not None and options.spares is not None and (spare := options.spares.take(saved)) is not None:
        stack.push_async_exit(spare.stack)
        return spare.machine
    bundle = bundle or find_bundle()
    stack.enter_context(in_use(bundle))
    directory = await stack.enter_async_context(run_dir())
    network = await stack.enter_async_context(_network(options, directory))
    images = await stack.enter_async_context(options.fs.attach(directory))
    attachment = network + images + await stack.enter_async_context(_volumes(options, bundle, directory))
    transport = await stack.enter_async_context(options.hypervisor.transport(directory))
    spec = VMSpec(
        kernel=bundle.kernel, initrd=bundle.initrd, transport=transport, cpus=options.cpus, memory=options.memory,
        devices=attachment.devices, boot_timeout=options.boot_timeout, saved=saved, paused=paused,
    )  # fmt: skip
    return Machine(directory, bundle, attachment, spec)


@asynccontextmanager
async def _network(options: Options, directory: Path) -> AsyncIterator[Attachment]:
    """What the strategy makes, with the names that were asked for."""
    network = options.network
    assert not isinstance(network.strategy, str)        # strategies.network made it a value
    wanted = evolve(network.wanted, hostname=options.hostname)
    async with network.strategy.attach(directory, wanted) as made:
        servers = network.dns or made.nameservers or (servers_for_guests() if made.interfaces else ())
        yield evolve(
            made, nameservers=servers, search=network.search or made.search,
            hosts=made.hosts + tuple(network.hosts.items()),
        )  # fmt: skip


def _volumes(options: Options, bundle: Bundle, directory: Path) -> AbstractAsyncContextManager[Attachment]:
    if not options.volumes:
        return nullcontext(Attachment())
    from pykata.rootfs import found
    from pykata.volumes.attached import attached as shared

    return shared(options.volumes, directory, partial(found, options, bundle))


def _serving(agent: AgentClient, options: Options) -> AbstractAsyncContextManager[None]:
    if not any(isinstance(volume, FsspecVolume) for volume in options.volumes.values()):
        return nullcontext()
    from pykata.volumes.serving import serving

    return serving(agent, options.volumes)


async def up(
    stack: AsyncExitStack, options: Options, machine: Machine, talk: Callable[[VM], Awaitable[Talked]]
) -> tuple[float, VM, Talked]:
    """Wait for a slot, then what the boot timeout counts: from the spawn of the VMM to the end of ``talk``.

    Returns when the slot was there, the machine, and what ``talk`` returned.
    """
    console: list[VM] = []
    cost = BOOTED if machine.spec.saved is None else RESTORED
    async with admitted(cost, options.admission_timeout):
        slot = time.monotonic()
        try:
            with anyio.fail_after(options.boot_timeout):
                vm = await _running(stack, options, machine)
                console.append(vm)
                await stack.enter_async_context(ended_with(vm, machine.attachment.lost))
                # Nobody can be told yet to go on without.
                async with ended_with(vm, [one.ended for one in machine.attachment.served]):
                    return slot, vm, await talk(vm)
        except TimeoutError as late:
            raise _too_late(options, machine, console[0].console() if console else "") from late


def _too_late(options: Options, machine: Machine, said: str) -> BootTimeoutError:
    within = f"within {options.boot_timeout:g} s"
    if machine.spec.saved is not None and machine.spec.saved.is_loading():
        return BootTimeoutError(f"the memory of the saved guest wasn't read from disk {within}", console=said,
                                hint="raise boot_timeout where the disk is that slow")
    return BootTimeoutError(f"the guest's agent didn't answer {within}", console=said,
                            hint="raise boot_timeout on a busy host; the error's console shows how far the guest came")


async def _running(stack: AsyncExitStack, options: Options, machine: Machine) -> VM:
    if (vm := machine.vm) is None:
        async with explained(machine.attachment):
            return await stack.enter_async_context(options.hypervisor.boot(machine.spec, machine.directory))
    vm.spawned_at = vm.ready_at = time.monotonic()      # as far as this sandbox is concerned
    return vm


@asynccontextmanager
async def connected(
    vm: VM, stream: socket.socket, *, greeting: bytes = b"", parked: bool = False
) -> AsyncIterator[AgentClient]:
    """A connection to the agent, over a stream that it then owns."""
    # Importing gRPC takes 0.1 s. The guest needs longer than that for its boot, on another core.
    from pykata.agent.client import connect as connect_agent

    async with connect_agent(stream, greeting=greeting, parked=parked, lend=vm.lend) as agent:
        yield agent


async def _dialled(vm: VM, transport: Transport) -> socket.socket:
    """The stream to the agent. A listener doesn't notice that who should dial it has died, so that is watched."""
    dead: list[VMError] = []
    with ExitStack() as unused, anyio.CancelScope() as waiting:

        async def watch() -> None:
            dead.append(await vm.died())
            waiting.cancel()

        async with alongside(watch()):
            stream = unused.enter_context(await connect(transport))
        unused.pop_all()
        return stream
    raise BootError(f"the guest didn't boot: {dead[0]}", console=vm.console())


async def set_up(vm: VM, agent: AgentClient, options: Options, attachment: Attachment) -> SetupResponse:
    """The first call. What is behind its failure is raised."""
    from pykata.requests import setup_request

    request = setup_request(options.hostname, attachment)
    try:
        return await agent.setup(request, timeout=options.boot_timeout)
    except AgentError as error:
        raise await boot_error(vm, error) from error


async def boot_error(vm: VM, error: AgentError) -> VMError:
    """What is behind an agent that can't be reached: a guest that died, if it did."""
    why: str = str(error)
    with anyio.move_on_after(DEATH_NOTICE):
        why = str(await vm.died())
    return BootError(f"the guest didn't boot: {why}", console=vm.console())


def memory_limit(answer: SetupResponse) -> int:
    """What a container may use, bytes."""
    return max(answer.memory_available - SPARE_MEMORY, SPARE_MEMORY)


def _timings(begun: Begun, slot: float, vm: VM, answer: SetupResponse) -> Timings:
    ready, entered = time.monotonic(), begun.entered
    # The guest's clock starts some time after its VMM did; its answer says what it showed then, so count back from now.
    guest_zero = ready - answer.now_ns / 1e9
    return Timings(
        slot=slot - entered,
        spawned=vm.spawned_at - entered,
        vmm_ready=vm.ready_at - entered,
        kernel=guest_zero + answer.kernel_ns / 1e9 - entered,
        agent=guest_zero + answer.agent_ns / 1e9 - entered,
        ready=ready - entered,
        why=begun.why,
    )
