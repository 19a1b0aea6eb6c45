"""Starting a sandbox from a guest that was saved, and making the template of those that were booted."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from attrs import evolve, frozen

from pykata import first_image, saved, template_cache
from pykata.admission import check_memory
from pykata.boot import Begun, Machine, attached, boot_error, booted, connected, memory_limit, set_up, up
from pykata.concurrency import alongside
from pykata.errors import (
    AgentError,
    BootTimeoutError,
    ConfigError,
    HostError,
    SavedDamagedError,
    SavedElsewhereError,
    VMError,
)
from pykata.guest import Bundle, find_bundle
from pykata.host import finish
from pykata.hypervisors.base import VM
from pykata.loading import loading
from pykata.net.none import NoNetwork
from pykata.net.running import RunningNetwork
from pykata.options import Options
from pykata.origin import NOBODY, Origin
from pykata.running import Running
from pykata.spec import MIB, Attachment, SerialTransport, Timings

if TYPE_CHECKING:
    from pykata.agent.client import AgentClient

CLOCK_TOLERANCE = 0.0005
"""By what share the clock rates of two hosts may differ: as much makes a guest's clock wrong by 2 s in an hour."""

ASKED = {"hypervisor", "machine", "slots", "cpus", "memory"}
"""What of a machine's identity an option says."""


async def started(stack: AsyncExitStack, begun: Begun) -> Running:
    """A sandbox from where its options say, else from the template of its kind, which is made if there is none."""
    if begun.options.origin is not None:
        return await restored(stack, begun, begun.options.origin)
    if begun.options.snapshot is not None:
        return await _from_snapshot(stack, begun, begun.options.snapshot)
    try:
        kind = _kind(begun.options)
        template_cache.limit()
    except ConfigError as unfit:
        return await booted(stack, evolve(begun, why=unfit.message))
    except OSError as exc:
        return await booted(stack, evolve(begun, why=template_cache.unusable(exc)))
    begun = evolve(begun, options=kind.options)
    failed: list[tuple[Path, Origin, VMError | AgentError]] = []
    running = await _from_template(stack, begun, kind, failed)
    if running is None:
        why = "its template failed" if failed else "its template is being made"
        running = await _without_template(stack, begun, kind, why)
    for folder, origin, error in failed:
        # Not before there is a machine without it: else it was the host that could run none.
        template_cache.drop(folder, origin, error)
    running.on_first_image = partial(first_image.note, kind.folder, begun.options)
    return running


async def _from_template(
    stack: AsyncExitStack, begun: Begun, kind: _Kind, failed: list[tuple[Path, Origin, VMError | AgentError]]
) -> Running | None:
    """From the one with a container of the image that is likely to be run, else from the bare one. None: from none.

    Those whose machines ended are ``failed`` then.
    """
    folders = [kind.folder]
    if (record := first_image.expected(kind.folder, begun.options)) is not None:
        with_image = first_image.folder_of(kind.folder, record)
        folders.insert(0, with_image)
        if not with_image.exists():
            async with template_cache.loaded(kind.folder) as bare:
                if bare is not None:
                    await first_image.prepare(kind.folder, begun.options, record, bare)
    for folder in folders:
        async with AsyncExitStack() as using:
            origin = await using.enter_async_context(template_cache.loaded(folder))
            if origin is None:
                continue        # and what others load from there isn't held by us
            stack.push_async_exit(using.pop_all())
        try:
            return await _attempt(stack, begun, evolve(origin, bundle=kind.bundle))
        except BootTimeoutError:
            raise           # a busy host, and another boot would take longer
        except SavedDamagedError as damaged:
            template_cache.drop(folder, origin, damaged)
        except (VMError, AgentError) as error:
            failed.append((folder, origin, error))
        except HostError:
            if not template_cache.is_stale(origin):
                raise
            # Somebody has just removed it.
    return None


async def _without_template(stack: AsyncExitStack, begun: Begun, kind: _Kind, why: str) -> Running:
    with ExitStack() as turn:
        try:
            ours = turn.enter_context(template_cache.turn_to_make(kind.folder))
        except HostError as error:
            ours, why = False, template_cache.unusable(error)
        if ours:
            return await _making(stack, begun, kind)
    return await booted(stack, evolve(begun, why=why))


async def _from_snapshot(stack: AsyncExitStack, begun: Begun, folder: Path) -> Running:
    there = await finish(anyio.to_thread.run_sync(saved.identity, folder))
    options = _as_saved(begun.options, folder, there)
    check_memory(options.memory * MIB)
    begun = evolve(begun, options=options)
    _check_identity(folder, there, identity(options))
    origin = await stack.enter_async_context(loading(folder, "snapshot"))
    return await restored(stack, begun, origin)


def _as_saved(options: Options, folder: Path, there: Mapping[str, str]) -> Options:
    """With what was saved, where nothing else was asked for. Raises ConfigError, SavedDamagedError."""
    hypervisor, chosen = options.hypervisor, options.chosen
    try:
        if "hypervisor" not in chosen:
            hypervisor = hypervisor.like(there)
        cpus = options.cpus if "cpus" in chosen else int(there["cpus"])
        memory = options.memory if "memory" in chosen else int(there["memory"])
        hypervisor = hypervisor.saving(there)
    except (KeyError, ValueError, TypeError) as exc:
        if isinstance(exc, ConfigError):
            raise
        raise SavedDamagedError(f"the saved guest {folder} is damaged: {exc}") from exc
    disk = options.disk if {"disk", "memory"} & chosen else memory * MIB // 2
    return evolve(options, hypervisor=hypervisor, cpus=cpus, memory=memory, disk=disk)


def _check_identity(folder: Path, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises ConfigError or SavedElsewhereError that names what differs."""
    differ = [name for name in sorted({*there, *here}) if not _same(name, there.get(name, ""), here.get(name, ""))]
    said = [(name, f"{name} {there.get(name)!r}, here {here.get(name)!r}") for name in differ]
    if asked := [text for name, text in said if name in ASKED]:
        raise ConfigError(f"{folder} was saved with another {', '.join(asked)}", hint="leave out what was saved")
    if said:
        raise SavedElsewhereError(f"{folder} was saved with another {', '.join(text for _, text in said)}",
                                  hint="restore it with the options it was saved with, by the same QEMU")


def _same(name: str, there: str, here: str) -> bool:
    if name == "tsc_khz" and there.isdigit() and here.isdigit():
        return abs(int(there) - int(here)) <= int(here) * CLOCK_TOLERANCE      # it is measured at each boot of a host
    return there == here


@frozen
class _Kind:
    """Of sandboxes that can go on from the same template."""

    options: Options
    folder: Path
    bundle: Bundle      # to find it again takes a start some milliseconds


def _kind(options: Options) -> _Kind:
    """Raises ConfigError that says why there can be no template."""
    hypervisor = options.hypervisor.saving()
    if options.volumes:
        raise ConfigError("a template has no volumes")
    if options.fs.shared:
        raise ConfigError("a template has no files of the host")
    if options.network.strategy != NoNetwork() or options.network.hosts:
        raise ConfigError("a template has no network")
    options = evolve(options, hypervisor=hypervisor)
    bundle = find_bundle()
    return _Kind(options, template_cache.folder_of(identity(options, bundle)), bundle)


def identity(options: Options, bundle: Bundle | None = None) -> dict[str, str]:
    """What must be the same for a saved guest to go on in a sandbox with these options."""
    sizes = {"cpus": str(options.cpus), "memory": str(options.memory)}
    return {**options.hypervisor.identity(), **sizes, "bundle": (bundle or find_bundle()).hash}


async def _attempt(stack: AsyncExitStack, begun: Begun, origin: Origin) -> Running:
    """As :func:`restored`; what was started for it is gone if it fails."""
    async with AsyncExitStack() as attempt:
        running = await restored(attempt, begun, origin)
        stack.push_async_exit(attempt.pop_all())
    return running


async def restored(stack: AsyncExitStack, begun: Begun, origin: Origin) -> Running:
    """A machine that goes on from a saved one; what belongs to it is on the ``stack``."""
    origin.vm.file.fileno()         # raises if it is there no more, before anything is started
    machine = await attached(stack, begun.options, origin.vm, bundle=origin.bundle, paused=origin.is_busy)

    async def talk(vm: VM) -> AgentClient:
        return await taken_over(stack, vm, machine, begun.options, origin)

    slot, vm, agent = await up(stack, begun.options, machine, talk)
    timings = evolve(_timings(begun, slot, vm), start=origin.start)
    running = _running(begun, machine, vm, agent, origin.memory_limit, timings)
    running.inherit(origin)
    if machine.rehearsed:
        running.end_rehearsal()
    return running


def _timings(begun: Begun, slot: float, vm: VM) -> Timings:
    return Timings(
        slot=slot - begun.entered, spawned=vm.spawned_at - begun.entered, vmm_ready=vm.ready_at - begun.entered,
        ready=time.monotonic() - begun.entered,
    )  # fmt: skip


def _running(
    begun: Begun, machine: Machine, vm: VM, agent: AgentClient, limit: int, timings: Timings
) -> Running:
    return Running(
        options=begun.options, bundle=machine.bundle, run_dir=machine.directory, vm=vm, agent=agent,
        memory_limit=limit, entered=begun.entered, timings=timings, network=RunningNetwork.of(machine.attachment),
    )  # fmt: skip


async def taken_over(
    stack: AsyncExitStack, vm: VM, machine: Machine, options: Options, origin: Origin
) -> AgentClient:
    """The agent of a saved guest, after that has become another guest than the others."""
    if (agent := machine.agent) is None:
        connection = connected(vm, _port(machine).host, greeting=origin.greeting, parked=origin.parked)
        agent = await stack.enter_async_context(connection)
    return await _another(vm, machine, agent, options)


async def _another(vm: VM, machine: Machine, agent: AgentClient, options: Options) -> AgentClient:
    from pykata.agent.v1 import CloneRequest

    try:
        request = CloneRequest(hostname=options.hostname, entropy=os.urandom(64), signal=options.signal)
        # One that stands still goes on when the request is there: the agent is the first to run, and takes it.
        async with alongside(vm.resume()) if machine.spec.paused else nullcontext():
            await agent.clone(request, timeout=options.boot_timeout)
    except AgentError as error:
        raise await boot_error(vm, error) from error
    return agent


def _port(machine: Machine) -> SerialTransport:
    assert isinstance(machine.spec.transport, SerialTransport)      # see Hypervisor.saving
    return machine.spec.transport


async def _making(stack: AsyncExitStack, begun: Begun, kind: _Kind) -> Running:
    """A sandbox that is booted, and on the way to its first command leaves a template behind."""
    machine = await attached(stack, begun.options)

    async def talk(vm: VM) -> tuple[AgentClient, int, str]:
        # Nothing of this sandbox's is in the guest yet: no name, no entropy that it will use, no environment.
        async with connected(vm, _port(machine).host.dup()) as first:
            answer = await set_up(vm, first, evolve(begun.options, hostname=NOBODY), Attachment())
            greeting = await first.park()
        why = await _keep(vm, kind, greeting, memory_limit(answer))
        agent = await stack.enter_async_context(connected(vm, _port(machine).host, greeting=greeting, parked=True))
        await _another(vm, machine, agent, begun.options)
        return agent, memory_limit(answer), why

    slot, vm, (agent, limit, why) = await up(stack, begun.options, machine, talk)
    timings = evolve(_timings(begun, slot, vm), why=why)
    return _running(begun, machine, vm, agent, limit, timings)


async def _keep(vm: VM, kind: _Kind, greeting: bytes, limit: int) -> str:
    """Put the machine as it is now into the cache. Where that can't be done the sandbox goes on without.

    Returns why the sandbox has booted.
    """
    try:
        async with vm.saved() as state:
            origin = Origin(
                vm=state, greeting=greeting, parked=True, memory_limit=limit, start="template",
                identity=identity(kind.options),
            )  # fmt: skip
            await finish(anyio.to_thread.run_sync(template_cache.keep, kind.folder, origin))
    except HostError as error:
        return template_cache.unusable(error)
    return "there was no template of its kind"
