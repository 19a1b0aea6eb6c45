"""A sandbox that is up: what its containers and processes need of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from copy import copy
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anyio
from attrs import define, evolve, field

from pykata.errors import (
    AgentError,
    AgentLostError,
    AgentRefusedError,
    ConfigError,
    PykataError,
    ShareLostError,
    VMError,
)
from pykata.guest import Bundle
from pykata.hypervisors.base import VM
from pykata.net.running import RunningNetwork
from pykata.options import Options
from pykata.origin import Origin, SavedContainer
from pykata.spec import Disk, Image, Timings

if TYPE_CHECKING:
    from pykata.agent.client import AgentClient
    from pykata.ahead import NextFork
    from pykata.removals import Removals
    from pykata.spares import Spares
    from pykata.waiting import Waiting

DEATH_NOTICE = 5.0
"""Seconds between the end of the agent's connection and the end of the VMM: a panicking kernel still writes why."""


class ProcessId(NamedTuple):
    """Where the agent finds a process."""

    container: str
    process: str


class Loss(NamedTuple):
    """Files of the host that the guest had, whose server has ended."""

    of_images: bool
    """They are those of root filesystems, not of volumes."""
    error: ShareLostError


@define(eq=False)
class Running:
    """A booted virtual machine with its agent."""

    options: Options
    bundle: Bundle
    run_dir: Path
    vm: VM
    agent: AgentClient
    memory_limit: int
    """Most memory a container may use, bytes."""
    entered: float
    """``time.monotonic()`` when the sandbox was entered."""
    timings: Timings
    network: RunningNetwork = field(factory=RunningNetwork)
    broken: PykataError | None = None
    """Why nothing more can be done in this sandbox."""
    is_left: bool = False
    """Its machine is ended, and with that what serves it."""
    losses: list[Loss] = field(factory=list)
    """Those that this process has heard of."""
    on_loss: Callable[[Loss], None] = lambda loss: None
    """Told of each before the guest gets an error by it."""
    hear: Callable[[], None] = lambda: None
    """Takes what has come of losses by now, where they are another process's to note."""
    containers: dict[str, SavedContainer] = field(factory=dict)
    """Those that stay for several commands, by id, and those that wait for a first one."""
    ahead: Spares | None = None
    """The machine that was started for the last fork, if no child has taken it."""
    next_fork: NextFork | None = None
    """What is kept for the next one, once there was one."""
    is_paused: bool = False
    """The guest's CPUs stand still, so it answers nothing."""
    resumed: anyio.Event = field(factory=anyio.Event)
    """Set when they go on, and replaced."""
    main: str = ""
    """Of a container among them, that a template's setup has set up."""
    on_first_image: Callable[[Image], None] | None = None
    """Told which image is the first that is used."""
    waiting: Waiting | None = None
    """For the next run of an image that is run again and again."""
    removals: Removals | None = None
    """Those that nobody waits for; None: who has run something in a container of its own waits until that is gone."""
    making: anyio.Lock = field(factory=lambda: anyio.Lock(fast_acquire=True))
    """Held while a container is made that nobody waits for: nothing else shall find it half made."""
    namespace: str = ""
    """In each id, so that several processes can use one sandbox."""
    _numbers: count[int] = field(factory=lambda: count(1))

    def new_id(self, prefix: str) -> str:
        """A name for a container or process, unique in this sandbox."""
        return f"{prefix}{self.namespace}{next(self._numbers)}"

    def next_number(self) -> int:
        """The number in the next id."""
        return next(copy(self._numbers))

    def inherit(self, origin: Origin) -> None:
        """Take over what was in the guest when it was saved."""
        self.containers = {one.id: one for one in origin.containers}
        self.main = origin.main
        self._numbers = count(origin.next_number)

    def end_rehearsal(self) -> None:
        """Its container is gone."""
        self.containers = {key: one for key, one in self.containers.items() if not one.rehearsal}

    def check(self) -> None:
        """Raise why the sandbox can't be used any more, if it can't."""
        if self.broken is not None:
            raise self.broken.with_traceback(None)      # else each raise makes the traceback longer
        if self.is_paused:
            raise ConfigError("this sandbox is paused", hint="await sb.resume() first")

    async def settled(self) -> None:
        """Wait until what has run before is out of the guest: its memory is free, and so is its disk slot."""
        if self.removals is not None:
            await self.removals.done()

    def has_shared_root(self, image: Image) -> bool:
        """Whether the root filesystem of its containers is made of files of the host."""
        return self.options.fs.shared and image.disk is None

    def loss(self, *, shared_root: bool) -> ShareLostError | None:
        """Why a container lacks files that it had: its root filesystem, if that's shared, or a volume."""
        self.hear()
        return next((error for of_images, error in self.losses if shared_root or not of_images), None)

    def check_root(self, image: Image) -> None:
        """Raise why nothing can run in the containers of this image any more, if it can't."""
        self.hear()
        for of_images, error in self.losses:
            if of_images and self.has_shared_root(image):
                raise error.with_traceback(None)

    def check_files(self, image: Image) -> None:
        """Raise why no container of this image can be made any more, if it can't."""
        if (error := self.loss(shared_root=self.has_shared_root(image))) is not None:
            raise error.with_traceback(None)

    def fresh(self, image: Image) -> str | None:
        """The id of a container of this very image in which nothing has run yet, if there is one."""
        for one in self.containers.values():
            if one.fresh and (one.digest, one.config, one.disk) == (image.digest, image.config, self.options.disk):
                return one.id
        return None

    async def take_fresh(self, image: Image) -> str | None:
        """The same; it is the caller's now. One that is just being made is waited for.

        What is asked of the guest without waiting for anything else finds it as this leaves it: not paused.
        """
        async with self.making:
            await self.settled()
            self.check()
            found = self.fresh(image)
            if found is not None:
                del self.containers[found]
            return found

    async def uses(self, image: Image) -> None:
        """A container of this image is about to be made."""
        if self.waiting is not None:
            await self.waiting.makes_room(image)
        if self.on_first_image is not None:
            tell, self.on_first_image = self.on_first_image, None
            tell(image)

    def saw_output(self) -> None:
        """A command wrote something; the first time is one of the timings."""
        if self.timings.first_output is None:
            self.timings = evolve(self.timings, first_output=time.monotonic() - self.entered)
            if self.options.spares is not None:
                self.options.spares.replace()

    async def why(self, error: AgentError) -> PykataError:
        """What is behind an error of the agent: the end of its virtual machine, if it ended. The sandbox is broken."""
        if isinstance(error, AgentLostError):
            await self._notice_death()
        if self.broken is None:
            error.console = self.vm.console()
            self.broken = error
        return self.broken

    @asynccontextmanager
    async def explained(self, image: Image | None = None) -> AsyncIterator[None]:
        """Turn the end of the connection into what caused it; so with what a container of ``image`` lacks files for."""
        try:
            yield
        except AgentLostError as lost:
            raise await self.why(lost) from lost
        except AgentRefusedError as refused:
            if image is not None and (error := self.loss(shared_root=self.has_shared_root(image))) is not None:
                raise error.with_traceback(None) from refused
            raise

    @asynccontextmanager
    async def plugged(self, disk: Disk) -> AsyncIterator[str]:
        """A disk in the virtual machine; yields its serial. If the machine is dead, why is raised."""
        async with AsyncExitStack() as stack:
            try:
                serial = await stack.enter_async_context(self.vm.plug(disk))
            except VMError as error:
                raise await self.why_not(error) from error
            yield serial

    async def why_not(self, error: VMError) -> PykataError:
        """What is behind an error of the virtual machine's: its end, if it ended."""
        await self._notice_death()
        return self.broken or error

    async def _notice_death(self) -> None:
        if self.broken is None:
            with anyio.move_on_after(DEATH_NOTICE):
                died = await self.vm.died()
                self.broken = self.broken or died
