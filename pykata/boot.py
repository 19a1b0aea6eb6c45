"""Booting: everything between a sandbox's options and a guest that takes containers."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from pykata.concurrency import alongside, boot_slots
from pykata.errors import AgentError, BootError, BootTimeoutError, IsolationError, SandboxClosedError, VMError
from pykata.guest import find_bundle
from pykata.host import run_dir
from pykata.hypervisors.base import VM
from pykata.options import Options
from pykata.running import DEATH_NOTICE, Running
from pykata.spec import MIB, Accel, Attachment, Isolation, Timings, Transport, VMSpec
from pykata.transport import connect

if TYPE_CHECKING:
    from pykata.agent.client import AgentClient
    from pykata.agent.v1 import SetupResponse

SPARE_MEMORY = 16 * MIB
"""What containers leave to the guest's kernel and agent, so that a greedy one meets its own limit first."""


class EmulationWarning(UserWarning):
    """Sandboxes of this process run under emulation, which QEMU doesn't count as a security boundary."""


@asynccontextmanager
async def boot(options: Options) -> AsyncIterator[Running]:
    """Boot a virtual machine; yields when its agent is ready. Undone in reverse order, also when it fails half-way."""
    entered = time.monotonic()
    check_isolation(options)
    bundle = find_bundle()
    async with AsyncExitStack() as stack:
        directory = await stack.enter_async_context(run_dir())
        network = await stack.enter_async_context(options.network.attach(directory))
        transport = await stack.enter_async_context(options.hypervisor.transport(directory))
        spec = VMSpec(
            kernel=bundle.kernel, initrd=bundle.initrd, transport=transport, cpus=options.cpus, memory=options.memory,
            devices=network.devices, boot_timeout=options.boot_timeout,
        )  # fmt: skip
        async with boot_slots():
            slot = time.monotonic()
            vm, agent, answer = await _up(stack, options, spec, network, directory)
        running = Running(
            options=options, bundle=bundle, run_dir=directory, vm=vm, agent=agent,
            memory_limit=max(answer.memory_available - SPARE_MEMORY, SPARE_MEMORY),
            entered=entered, timings=_timings(entered, slot, vm, answer),
        )  # fmt: skip
        try:
            yield running
        finally:
            # What another task still does in it ends with this rather than with the connection's end.
            running.broken = SandboxClosedError("this sandbox was left", hint="use it inside its 'async with' block")


async def _up(
    stack: AsyncExitStack, options: Options, spec: VMSpec, network: Attachment, directory: Path
) -> tuple[VM, AgentClient, SetupResponse]:
    """The part that the boot timeout counts: from the spawn of the VMM to the agent's answer."""
    console: list[VM] = []
    try:
        with anyio.fail_after(options.boot_timeout):
            vm = await stack.enter_async_context(options.hypervisor.boot(spec, directory))
            console.append(vm)
            agent = await stack.enter_async_context(_agent(vm, spec.transport))
            return vm, agent, await _set_up(vm, agent, options, network)
    except TimeoutError as late:
        said = console[0].console() if console else ""
        raise BootTimeoutError(
            f"the guest's agent didn't answer within {options.boot_timeout:g} s",
            console=said, hint="raise boot_timeout on a busy host; the error's console shows how far the guest came",
        ) from late  # fmt: skip


@asynccontextmanager
async def _agent(vm: VM, transport: Transport) -> AsyncIterator[AgentClient]:
    # Importing gRPC takes 0.1 s. The guest needs longer than that for its boot, on another core.
    from pykata.agent.client import connect as connect_agent

    async with connect_agent(await _dialled(vm, transport)) as agent:
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


async def _set_up(vm: VM, agent: AgentClient, options: Options, network: Attachment) -> SetupResponse:
    from pykata.requests import setup_request

    request = setup_request(options.hostname, network)
    try:
        return await agent.setup(request, timeout=options.boot_timeout)
    except AgentError as error:
        raise await _boot_error(vm, error) from error


async def _boot_error(vm: VM, error: AgentError) -> VMError:
    """What is behind an agent that can't be reached: a guest that died, if it did."""
    why: str = str(error)
    with anyio.move_on_after(DEATH_NOTICE):
        why = str(await vm.died())
    return BootError(f"the guest didn't boot: {why}", console=vm.console())


def isolation_of(accel: Accel) -> Isolation:
    """What keeps a guest in, by what executes it."""
    return "hardware" if accel == "kvm" else "emulated"


_warned = False


def check_isolation(options: Options) -> None:
    """Refuse where hardware isolation was asked for and there is none; warn once where there is none."""
    global _warned
    isolation = isolation_of(options.hypervisor.accel_here())
    if options.isolation == "hardware" and isolation != "hardware":
        raise IsolationError(
            "isolation='hardware' was asked for, and this host has no usable hardware virtualization",
            hint="run on a host with KVM (pykata check says what is missing), or leave isolation out",
        )
    if options.isolation is None and isolation == "emulated" and not _warned:
        _warned = True
        warnings.warn(
            "no usable KVM: sandboxes run under emulation, which QEMU doesn't count as a security boundary; "
            "pass isolation='hardware' to refuse that, isolation='emulated' to accept it",
            EmulationWarning, stacklevel=_outside(),
        )  # fmt: skip


def _outside() -> int:
    """The ``stacklevel`` of who entered the sandbox, for a warning of our caller's."""
    ours = (str(Path(__file__).parent), contextlib.__file__)
    frame, level = sys._getframe(1), 1
    while frame.f_code.co_filename.startswith(ours) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    return level


def _timings(entered: float, slot: float, vm: VM, answer: SetupResponse) -> Timings:
    ready = time.monotonic()
    # The guest's clock starts some time after its VMM did; its answer says what it showed then, so count back from now.
    guest_zero = ready - answer.now_ns / 1e9
    return Timings(
        slot=slot - entered,
        spawned=vm.spawned_at - entered,
        vmm_ready=vm.ready_at - entered,
        kernel=guest_zero + answer.kernel_ns / 1e9 - entered,
        agent=guest_zero + answer.agent_ns / 1e9 - entered,
        ready=ready - entered,
    )
