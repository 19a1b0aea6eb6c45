"""Templates: a sandbox that is set up once, and any number of others that go on from there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self

import anyio
from attrs import evolve, fields

from pykata.container import Container, kept_container
from pykata.errors import ConfigError, SandboxClosedError
from pykata.foreseen import ready_image
from pykata.making import fresh_container
from pykata.net.network import Network
from pykata.net.none import NoNetwork
from pykata.options import (
    Options,
    check_cmd,
    check_count,
    check_env,
    check_hostname,
    check_image,
    check_seconds,
    check_signal,
    check_template,
    forked,
    new_hostname,
)
from pykata.origin import NOBODY, Origin
from pykata.running import Running
from pykata.sandbox import Sandbox
from pykata.spares import Spares, kept_ready
from pykata.spec import Image

Setup = Callable[[Sandbox], Awaitable[object]]

AGE = 2.5
"""Seconds that a guest is up, at least, before it becomes a template. Two seconds after it has booted Linux does for
the first time what it does again and again from then on, and makes a thread for that: each guest that goes on from a
younger one would do so, and translate the code for it, which takes 1.5 MiB."""


class Template:
    """A sandbox that was set up once, saved, and goes on in as many as one likes.

    ::

        async with Template("./images/app", setup=[["python3", "-c", "import app"]]) as template:
            async with template.sandbox() as sb:
                done = await sb.run("./images/app", ["python3", "-m", "app"])

    In each of them a container of ``image`` waits for the first :meth:`Sandbox.run` or :meth:`Sandbox.process` of that
    image, so that none has to be made for it. With ``setup`` there is another container of the image, ``sb.main``, the
    same in all of them with whatever runs in it. It is set up by commands, each of which must succeed, or by an async
    function of the :class:`Sandbox`, which has it as ``sb.main``; its processes in the background live on in each.

    ``spares`` machines are kept ready, so that a sandbox needn't wait for one to be started; one that was taken is
    replaced. With 0 a start takes longer, and there is nothing that nobody uses.

    ``options`` are those of :class:`Sandbox`, but for ``hostname``, ``network`` and ``volumes``. ``env`` is that of the
    setup alone: each sandbox has its own. Nothing of the maker's gets into the template but what the setup puts there.
    What a process of the setup got by ``env=`` is one of those things as long as that process runs, in each sandbox.

    Entering raises what entering a Sandbox raises, and :class:`CommandFailedError` for a setup that failed.
    """

    def __init__(
        self, image: str, *, setup: Sequence[Sequence[str]] | Callable[[Sandbox], Awaitable[object]] | None = None,
        spares: int = 1, **options: Any,
    ) -> None:  # fmt: skip
        check_image(image)
        self.image = image
        """What its containers are made from."""
        self._count = 0 if spares == 0 and not isinstance(spares, bool) else check_count("spares", spares)
        self._setup = _checked(setup)
        if isinstance(options.get("template"), Template):
            raise ConfigError("a template can't be made from another one")
        if options.get("hostname") is not None:
            raise ConfigError("hostname: each sandbox of a template has its own", hint="template.sandbox(hostname=...)")
        self._sandbox = Sandbox(**options)
        self.options = self._sandbox.options
        """What was asked for, checked and completed."""
        if self.options.network != Network(NoNetwork()):
            raise ConfigError("network: a template has none, as all that go on from it would have the same addresses",
                              hint='boot a sandbox with a network: Sandbox(network=..., template="off")')
        if self.options.fs.shared:
            raise ConfigError(f"fs: a template can't have files of the host, and {self.options.fs.name} shares them",
                              hint='fs="block"')
        if self.options.volumes:
            raise ConfigError("volumes: a template has none", hint="copy files into its container in the setup")
        hypervisor = self.options.hypervisor.saving()       # raises why it can't be
        self._sandbox.options = evolve(self.options, hypervisor=hypervisor, env={}, bare=True)
        self._stack = AsyncExitStack()
        self._origin: Origin | None = None
        self._spares: Spares | None = None

    async def __aenter__(self) -> Self:
        if self._origin is not None:
            raise SandboxClosedError("this template is entered already", hint="one block makes it, and many use it")
        async with AsyncExitStack() as stack:
            origin = await self._made(stack)
            kept = kept_ready(forked(self._sandbox.options, origin), origin, self._count)
            self._spares = await stack.enter_async_context(kept)
            self._origin = origin
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._origin = self._spares = None
        await self._stack.__aexit__(kind, error, trace)

    def sandbox(
        self, *, env: Mapping[str, str] | None = None, timeout: float | None = None, hostname: str | None = None,
        signal: int = 0,
    ) -> Sandbox:  # fmt: skip
        """A sandbox that goes on from here, to be entered while the template is; it may stay open longer.

        ``env``, ``timeout`` (by default the template's) and ``hostname`` are as for :class:`Sandbox`. ``signal`` is
        sent to the processes that the setup has started and that still run.
        """
        options = evolve(
            self._sandbox.options,
            env=check_env(env),
            timeout=self.options.timeout if timeout is None else check_seconds("timeout", timeout),
            hostname=check_hostname(hostname or new_hostname()),
            signal=check_signal(signal, least=0),
        )
        return Sandbox._of(self.origin_of(options))

    def origin_of(self, options: Options) -> Options:
        """The same, going on from here."""
        if self._origin is None:
            raise SandboxClosedError("this template is not open", hint="use it inside its 'async with' block")
        return evolve(options, origin=self._origin, spares=self._spares)

    async def _made(self, stack: AsyncExitStack) -> Origin:
        """The saved guest. Its memory and its image stay on the ``stack``."""
        async with AsyncExitStack() as making:
            options = self._sandbox.options
            image = await making.enter_async_context(ready_image(options, self.image, options.pull))
            running = (await making.enter_async_context(self._sandbox))._open
            if self._setup is not None:
                main = await making.enter_async_context(kept_container(running, image))
                self._sandbox._main = main
                await self._set_up(running, main)
                running.main = main.id
                await running.agent.hold(True)      # what runs on stands behind the agent from now on
            await making.enter_async_context(_waiting(running, image, warm=self._setup is None, rehearsal=True))
            # Who clears the cache of images leaves this one alone.
            await stack.enter_async_context(running.options.fs.rootfs(image, running.run_dir))
            await _aged(running)
            return await stack.enter_async_context(_saved(running))

    async def _set_up(self, running: Running, main: Container) -> None:
        without = running.options
        running.options = evolve(without, env=self.options.env)
        try:
            if callable(self._setup):
                await _awaitable(self._setup(self._sandbox))
                return
            for command in self._setup or ():
                await main.run(command, check=True)
        finally:
            running.options = without


def _checked(setup: object) -> Sequence[Sequence[str]] | Setup | None:
    if setup is None or callable(setup):
        return setup
    if isinstance(setup, str | bytes) or not isinstance(setup, Iterable):
        raise ConfigError(f"setup={setup!r} is neither a list of commands nor an async function of the sandbox",
                          hint='e.g. [["sh", "-c", "make"]]')
    return [check_cmd(each, "setup") or () for each in setup]


def _awaitable(returned: object) -> Awaitable[object]:
    if not isinstance(returned, Awaitable):
        raise ConfigError(f"setup returned {returned!r}, which can't be awaited",
                          hint="give an async function: async def setup(sb): await sb.main.run(...)")
    return returned


SHAPE = ("hypervisor", "fs", "network", "cpus", "memory", "volumes")
"""Options that a saved guest has for good."""


def adopted(options: Options, template: object) -> Options:
    """Those of a sandbox of a template: what isn't given is as there. Raises ConfigError for what contradicts it."""
    if not isinstance(template, Template):
        check_template(template)        # type: ignore[arg-type]  # raises
        raise AssertionError
    plain, theirs = Sandbox().options, template.options
    given = [each.name for each in fields(Options) if getattr(options, each.name) != getattr(plain, each.name)]
    for name in given:
        here, there = getattr(options, name), getattr(theirs, name)
        if name in SHAPE and here != there:
            raise ConfigError(f"{name}={here!r} isn't what the template has: {there!r}",
                              hint=f"leave {name} out, or give it to the Template")
    own = {name: getattr(options, name) for name in ("hostname", "env", *given) if name not in SHAPE}
    return evolve(template._sandbox.options, **own)


@asynccontextmanager
async def bare_with(options: Options, bare: Origin, image: str) -> AsyncIterator[Origin]:
    """A bare template, and with it a container of ``image`` that waits for its first command."""
    # Nothing of the sandbox's own that is entered just now; and its image is here, as others have used it.
    options = evolve(forked(options, bare), env={}, pull="never", progress=None, hostname=NOBODY)
    async with AsyncExitStack() as making:
        running = (await making.enter_async_context(Sandbox._of(options)))._open
        await making.enter_async_context(_waiting(running, image, warm=True))
        yield await making.enter_async_context(_saved(running))


@asynccontextmanager
async def _waiting(running: Running, image: str | Image, *, warm: bool, rehearsal: bool = False) -> AsyncIterator[None]:
    """A container in which a process waits for its first command; ``warm``, after another one of its image was used.

    ``rehearsal``: and another one for that.
    """
    from pykata.rootfs import prepared

    async with AsyncExitStack() as stack:
        async with AsyncExitStack() as used:
            if warm:
                # The shell's file, its libraries and what the kernel makes at first need are in memory from then on.
                # In a container of its own: nothing shall have run in the one that waits.
                other = await used.enter_async_context(kept_container(running, image))
                await other.shell(":")      # an image may have none
            rootfs = await stack.enter_async_context(prepared(running, image))
            if rehearsal:
                await stack.enter_async_context(fresh_container(running, rootfs, rehearsal=True))
            # Last: it is awaited until its process has explored. By then what waits in the other one does wait, too,
            # and won't begin with that in each guest that goes on from here.
            await stack.enter_async_context(fresh_container(running, rootfs, explored=True))
        yield


async def _aged(running: Running) -> None:
    """Wait until the guest's own clock says that it is up for as long as it has to be: it stands still in a pause."""
    up = (await running.agent.stats()).now_ns / 1e9
    await anyio.sleep(max(0.0, AGE - max(0.0, up)))     # whatever a guest says


@asynccontextmanager
async def _saved(running: Running) -> AsyncIterator[Origin]:
    """This sandbox, which nobody can use any more, as what others go on from while the block runs."""
    from pykata.saving import check_savable, origin  # who imports pykata need not wait for it

    check_savable(running)
    await running.settled()
    idle = await _is_idle(running)
    if idle and running.main:
        await running.agent.hold(False)     # it needs no precedence over processes that aren't there
    greeting = await running.agent.park()
    # Nobody talks to this guest any more: what is to be undone in it goes with its machine.
    running.broken = SandboxClosedError("this sandbox has become a template")
    async with running.vm.saved() as vm:
        yield origin(running, vm, "template", greeting, parked=True, idle=idle)


async def _is_idle(running: Running) -> bool:
    """Whether nothing runs on in the container that was set up, but its init."""
    if not running.main:
        return True
    said = (await running.agent.stats()).containers.get(running.main)
    return said is not None and said.pids <= 1
