"""A detached sandbox in use by this process: its machine and its agent, over a connection to its keeper."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count
from typing import Any

from attrs import frozen

from pykata.detached.directory import find
from pykata.detached.link import Keeper, connected
from pykata.detached.welcome import Welcome, from_descriptor
from pykata.detached.wire import PROTOCOL
from pykata.errors import ConfigError, DetachedLostError, HostError, PykataError, SandboxClosedError, VMDiedError
from pykata.host import finish
from pykata.hypervisors.base import VM
from pykata.net.running import RunningNetwork
from pykata.running import Running
from pykata.spec import Disk, Image, place_of


class RemoteVM(VM):
    """The virtual machine of a keeper."""

    unsavable = "it is detached, and belongs to its keeper; fork or save one that this program has entered"

    def __init__(self, keeper: Keeper, welcome: Welcome) -> None:
        self.pid = welcome.vmm
        self.accel = welcome.accel
        self.spawned_at = welcome.spawned_at
        self.ready_at = welcome.ready_at
        self._keeper = keeper
        self._console = welcome.console
        self._plugs = count(1)

    @asynccontextmanager
    async def plug(self, disk: Disk) -> AsyncIterator[str]:
        number = next(self._plugs)
        try:
            yield await self._plugged(disk, number)
        finally:
            await finish(self._unplugged(number))

    async def _plugged(self, disk: Disk, number: int) -> str:
        try:
            descriptor = os.open(place_of(disk), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise HostError(f"can't open the disk {disk.path}: {exc.strerror}") from exc
        try:
            answer = await self._keeper.call(
                "plug", plug=number, tag=disk.tag, format=disk.format, device=disk.is_device, descriptors=(descriptor,))
        except (DetachedLostError, SandboxClosedError) as ended:
            raise self._as_death(ended) from ended
        finally:
            os.close(descriptor)
        return str(answer.body["ok"])

    async def _unplugged(self, number: int) -> None:
        with suppress(PykataError):         # it is gone, and the disk with it
            await self._keeper.call("unplug", plug=number)

    def console(self) -> str:
        return self._console

    async def pause(self) -> None:
        raise ConfigError("a detached sandbox can't be paused: it may be others' as well")

    async def resume(self) -> None:
        raise ConfigError("a detached sandbox can't be paused, nor go on after that")

    def end(self, why: VMDiedError) -> None:
        raise NotImplementedError("only the keeper ends its machine")

    async def died(self) -> VMDiedError:
        return self._as_death(await self._keeper.gone())

    def _as_death(self, why: PykataError) -> VMDiedError:
        if isinstance(why, VMDiedError):
            self._console = why.console
            return why
        return VMDiedError(why.message, console=self._console, hint=why.hint)


@frozen
class Remote:
    """A connected sandbox, and its main container, if it has one."""

    running: Running
    main: tuple[str, Image] | None


@asynccontextmanager
async def remote(name: str) -> AsyncIterator[Remote]:
    """A detached sandbox, to be used like one of our own. Leaving ends what we have in it, and not the sandbox."""
    from pykata.agent.client import connect

    async with AsyncExitStack() as stack:
        keeper = await stack.enter_async_context(connected(find(name)))
        sock, welcome, answer = await _attached(keeper)
        agent = await stack.enter_async_context(connect(sock, bulk=False))   # the keeper is in between
        running = Running(
            options=welcome.options, bundle=welcome.bundle, run_dir=welcome.run_dir,
            vm=RemoteVM(keeper, welcome), agent=agent, memory_limit=welcome.memory_limit, entered=welcome.entered,
            timings=welcome.timings,
            network=RunningNetwork(
                welcome.ports, welcome.addresses, welcome.via, keeper.network if welcome.has_policy else None,
            ),
            namespace=str(answer["namespace"]), losses=keeper.losses, hear=keeper.hear,
        )  # fmt: skip
        try:
            yield Remote(running, welcome.main)
        finally:
            running.broken = SandboxClosedError("this sandbox was left", hint="use it inside its 'async with' block")


async def _attached(keeper: Keeper) -> tuple[socket.socket, Welcome, Mapping[str, Any]]:
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            answer = await keeper.call("attach", protocol=PROTOCOL, descriptors=(theirs.fileno(),))
        try:
            return ours, from_descriptor(answer.descriptors[0], Welcome), answer.body["ok"]
        finally:
            answer.close()
    except BaseException:
        ours.close()
        raise
