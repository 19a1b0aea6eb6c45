"""The sandbox: entering it boots a virtual machine, leaving it cleans up."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from attrs import evolve

from pykata.boot import boot
from pykata.command import command
from pykata.container import Container, inherited
from pykata.detached.handle import Detached, find_detached
from pykata.errors import ConfigError, SandboxClosedError
from pykata.fs.base import SharedFs
from pykata.hypervisors.base import Hypervisor
from pykata.net.base import NetworkStrategy
from pykata.net.network import Network
from pykata.opened import OpenSandbox
from pykata.options import (
    Options,
    Rlimits,
    check_count,
    check_env,
    check_hostname,
    check_image,
    check_isolation_wanted,
    check_patience,
    check_progress,
    check_pull,
    check_registries,
    check_seconds,
    check_signal,
    check_template,
    new_hostname,
)
from pykata.paths import check_path
from pykata.sizes import parse_size
from pykata.spec import MIB, Isolation, Progress, PullPolicy, Registries, TemplatePolicy
from pykata.strategies import network as find_network
from pykata.strategies import strategy
from pykata.volumes import Volume, check_volumes

if TYPE_CHECKING:
    from pykata.templates import Template


class Sandbox(OpenSandbox):
    """A virtual machine with a kernel of its own, in which containers run.

    ::

        async with Sandbox() as sb:
            done = await sb.run("builtin:busybox", ["echo", "hello"])
            print(done.stdout)

    ``hypervisor``, ``fs`` and ``network`` are values (``QEMU(machine="q35")``) or names (``"qemu"``); a
    :class:`Network` also says what the guest may reach, and which of its ports are published. ``memory`` is MiB or
    text such as ``"512M"``, and so is ``disk``, the size of the writable layer of each container (it is kept in the
    guest's memory; half of that by default). ``env`` is for every process. ``timeout`` (seconds) is the default for
    each command, ``boot_timeout`` that for the boot, counted from when it got its turn: no more virtual machines boot
    at a time than there are cores, for all processes of a user together, nor when the host has no memory for one more,
    which is waited for ``admission_timeout`` seconds (None: for ever). ``isolation="hardware"`` refuses to run where
    there is no hardware virtualization, ``"emulated"`` accepts that without a warning. ``pull`` says when a registry
    is asked for an image: for one that is ``"missing"`` here, ``"always"`` or ``"never"``; ``registries`` how, and
    ``progress`` is told each step of that.

    ``template="auto"`` goes on from a guest of this kind that was booted once, where it can be, and makes that template
    if there is none; ``"off"`` boots. ``sb.timings.start`` tells which. With a :class:`Template`, which must be open by
    when this is entered, it goes on from there, and whatever isn't given here is as in the template.

    ``volumes`` are directories and files of the host, and others, by their place in every container of this sandbox:
    a path is a directory or file that can be written; :class:`Bind` and :class:`Tmpfs` say more.

    Raises :class:`ConfigError` at once for what can't be right. Entering raises :class:`BundleError`,
    :class:`HostError` (:class:`AdmissionError` among them), :class:`BootError` and :class:`AgentError`.
    """

    def __init__(
        self,
        hypervisor: Hypervisor | str = "qemu",
        fs: SharedFs | str = "block",
        network: Network | NetworkStrategy | str = "none",
        *,
        cpus: int = 1,
        memory: int | str = "256M",
        disk: int | str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        boot_timeout: float = 60.0,
        admission_timeout: float | None = 30.0,
        hostname: str | None = None,
        isolation: Isolation | None = None,
        pull: PullPolicy = "missing",
        registries: Registries | None = None,
        progress: Progress | None = None,
        template: TemplatePolicy | Template = "auto",
        volumes: Mapping[str, Volume | str | Path] | None = None,
    ) -> None:
        mebibytes = parse_size("memory", memory) // MIB
        options = Options(
            hypervisor=strategy(Hypervisor, "pykata.hypervisors", hypervisor),  # type: ignore[type-abstract]
            fs=strategy(SharedFs, "pykata.filesystems", fs),  # type: ignore[type-abstract]
            network=find_network(network),
            cpus=cpus,
            memory=mebibytes,
            disk=mebibytes * MIB // 2 if disk is None else parse_size("disk", disk),
            hostname=new_hostname() if hostname is None else check_hostname(hostname),
            env=check_env(env),
            timeout=check_seconds("timeout", timeout),
            boot_timeout=check_seconds("boot_timeout", boot_timeout) or 60.0,
            admission_timeout=check_patience("admission_timeout", admission_timeout),
            isolation=check_isolation_wanted(isolation),
            pull=check_pull(pull),
            registries=check_registries(registries),
            progress=check_progress(progress),
            template=check_template(template) if isinstance(template, str) else "auto",
            volumes=check_volumes(volumes),
        )
        self._begin(options)
        if not isinstance(template, str):
            self._adopt(template)

    def _begin(self, options: Options) -> None:
        super().__init__(options)
        self._stack = AsyncExitStack()
        self._template: Template | None = None

    def _adopt(self, template: Template) -> None:
        from pykata.templates import adopted

        self.options = adopted(self.options, template)
        self._template = template

    @classmethod
    def _of(cls, options: Options) -> Self:
        """One with options that were checked before."""
        sandbox = cls.__new__(cls)
        sandbox._begin(options)
        return sandbox

    async def __aenter__(self) -> Self:
        if self._entered:
            raise SandboxClosedError("this sandbox is entered already", hint="make a Sandbox for each block")
        self._entered = True
        try:
            if self._template is not None:
                self.options = self._template.origin_of(self.options)
            async with AsyncExitStack() as stack:
                for one in self._foreseen:
                    await stack.enter_async_context(one.ready(self.options))
                self._running = running = await stack.enter_async_context(boot(self.options))
                self._stack = stack.pop_all()
        except BaseException:
            self._entered = False
            raise
        if self.options.snapshot is not None:
            self.options = running.options
        self._inherited = {one.id: one for one in inherited(running)}
        for container in self._inherited.values():
            self._stack.push_async_callback(container.leave)      # before the machine, which goes whatever happens here
        self._main = self._inherited.get(running.main)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running = None
        try:
            await self._stack.__aexit__(kind, error, trace)
        finally:
            self._entered = False
            self._foreseen.clear()

    async def detach(
        self,
        name: str,
        image: str | None = None,
        cmd: Sequence[str] | None = None,
        *,
        entrypoint: Sequence[str] | None = None,
        own_command: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        rlimits: Rlimits | None = None,
    ) -> Detached:
        """Boot this sandbox in a process of its own, where it outlives this program; instead of entering it.

        ::

            await Sandbox(memory="1G").detach("worker", "./images/app", ["serve"])

        It has a container of ``image``, if one is given, and in it the main command ``cmd``: it is running when this
        returns, what it writes goes to a log, and the sandbox ends when it ends. Without a command (``own_command``
        asks for the image's) the sandbox stays until it is stopped. ``name`` is its own among this user's.

        Raises what entering and :meth:`process` raise, and DetachedTakenError. If it fails, nothing is left.
        """
        from pykata.detached.start import start
        from pykata.detached.welcome import Request

        what = command(cmd, entrypoint=entrypoint, env=env, cwd=cwd, user=user, rlimits=rlimits)
        if image is not None:
            check_image(image)
        asked = cmd is not None or entrypoint is not None or own_command
        if self._entered:
            raise SandboxClosedError("this sandbox is entered already", hint="make another Sandbox to detach")
        if self._template is not None or self.options.origin is not None:
            raise ConfigError("a sandbox of a template or a fork can't be detached", hint="detach one of a snapshot")
        await start(Request(name=name, options=self.options, image=image, command=what if asked else None))
        return find_detached(name)

    @classmethod
    @asynccontextmanager
    async def connect(cls, name: str) -> AsyncIterator[Self]:
        """A detached sandbox, from any process of its user, also from many at once::

            async with Sandbox.connect("worker") as sb:
                done = await sb.main.run(["ps"])

        What is started in it ends when the block is left, as always; the sandbox stays.

        Raises DetachedNotFoundError, DetachedEndedError and DetachedLostError.
        """
        from pykata.detached.remote import remote

        async with remote(name) as connected:
            sandbox = cls._of(connected.running.options)
            sandbox._entered = True
            sandbox._running = connected.running
            sandbox._main = Container(connected.running, *connected.main) if connected.main else None
            try:
                yield sandbox
            finally:
                sandbox._running = None
                if sandbox._main is not None:
                    await sandbox._main.leave()

    async def fork(
        self, count: int = 1, *, env: Mapping[str, str] | None = None, signal: int = 0
    ) -> list[Sandbox]:
        """Sandboxes that go on from where this one is now, with all that runs in it. Enter them, one by one or at once.

        ::

            for child in await sb.fork(2):
                async with child:
                    await child.containers[container.id].run(["cat", "state"])

        This one stands still for some 10 ms while it is saved. Its processes go on in each child; their output there
        goes nowhere, and their stdin stays open. A child has another host name, machine-id and random numbers, which
        its processes can see by ``/run/pykata/generation``; ``signal`` is sent to those that were started from here. A
        child may be entered as long as this sandbox is open, and may then outlive it. ``env`` is that of what is
        started in the children: this sandbox's own isn't theirs.

        Raises ConfigError where that can't be done, HostError and VMError.
        """
        from pykata.saving import fork

        check_count("count", count)
        env, signal = check_env(env), check_signal(signal, least=0)
        options = evolve(await fork(self._stack, self._open), env=env, signal=signal)
        return [Sandbox._of(evolve(options, hostname=new_hostname())) for _ in range(count)]

    async def snapshot(self, path: str | os.PathLike[str]) -> None:
        """Save this sandbox with all that runs in it as the directory ``path``, from which :meth:`restore` goes on.

        It can be copied, also to another machine with the same QEMU and a CPU of the same clock rate. It holds the
        guest's memory with every secret in it, and is as trustworthy as whoever could write to it.

        Raises ConfigError, HostError and VMError.
        """
        from pykata.saving import snapshot

        await snapshot(self._open, check_path("path", path))

    @classmethod
    def restore(cls, path: str | os.PathLike[str], *, signal: int = 0, **options: object) -> Self:
        """A sandbox that goes on from a snapshot, to be entered. ``options`` are those of :class:`Sandbox`.

        ``signal`` is sent to the processes that were started there, as with :meth:`fork`.

        It has the memory, CPUs and machine that were saved, and ``sb.options`` says so once it is entered.

        Entering raises SavedMissingError, SavedDamagedError, SavedElsewhereError, ConfigError for options that were
        other ones in what was saved, and what entering a sandbox raises.
        """
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ConfigError(f"path={path!r} is not a path", hint="name the directory that snapshot() has made")
        sandbox = cls(**options)  # type: ignore[arg-type]
        if sandbox._template is not None:
            raise ConfigError("template: a sandbox goes on from a snapshot or from a template, not from both")
        # A name says nothing of the machine.
        chosen = {name for name, value in options.items() if name != "hypervisor" or not isinstance(value, str)}
        sandbox.options = evolve(
            sandbox.options, snapshot=check_path("path", path), chosen=frozenset(chosen),
            signal=check_signal(signal, least=0),
        )
        return sandbox

    async def pause(self) -> None:
        """Stop the guest's CPUs and timers. It takes no CPU time until :meth:`resume`, and no call gets an answer."""
        from pykata.saving import pause

        await pause(self._open)

    async def resume(self) -> None:
        """Go on after :meth:`pause`, with the right time."""
        from pykata.saving import resume

        await resume(self._open)
