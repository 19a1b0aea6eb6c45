"""What can be done with a sandbox that is open: run commands, make containers, look at how it does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from pykata.collect import collect
from pykata.command import MAX_OUTPUT, Callback, collection, command, shell
from pykata.completed import Completed
from pykata.container import Container, kept_container
from pykata.errors import ConfigError, SandboxClosedError
from pykata.foreseen import Foreseen
from pykata.isolation import isolation_of
from pykata.net.running import RunningNetwork
from pykata.options import Options, Rlimits, check_image, check_pull
from pykata.process import Process
from pykata.running import Running
from pykata.spec import Accel, Features, Isolation, PullPolicy, Terminal, Timings
from pykata.starting import single_process
from pykata.stats import Stats, decoded


class OpenSandbox:
    """A sandbox as its block sees it. :class:`Sandbox` adds how one comes to be, and what goes on from it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        """What was asked for, checked and completed."""
        self._entered = False
        self._running: Running | None = None
        self._main: Container | None = None
        self._inherited: dict[str, Container] = {}
        self._foreseen: list[Foreseen] = []

    async def run(
        self,
        image: str,
        cmd: Sequence[str] | None = None,
        *,
        entrypoint: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        rlimits: Rlimits | None = None,
        tty: bool | Terminal = False,
        input: bytes | str | None = None,
        timeout: float | None = None,
        on_stdout: Callback | None = None,
        on_stderr: Callback | None = None,
        max_output: int = MAX_OUTPUT,
        check: bool = False,
        pull: PullPolicy | None = None,
    ) -> Completed:
        """Run a command in a new container of ``image``, to its end; nothing of it runs afterwards.

        ``cmd`` None is the image's own; a list goes to the image's entrypoint, if it has one, as with Docker. ``input``
        is its stdin (empty by default). After ``timeout`` seconds it and all it started are killed; what it wrote is
        kept. ``on_stdout`` and ``on_stderr`` get output as it comes. Beyond ``max_output`` bytes of a stream the rest
        is read but not kept. Ending with another exit code than 0 raises only if ``check``. ``pull`` is when to ask the
        image's registry, ``"missing"``, ``"always"`` or ``"never"``, where it shall not be as the sandbox has it.

        ``rlimits`` are getrlimit(2)'s, such as ``{"nofile": 1024, "core": (0, -1)}``: a number for both, or soft and
        hard; -1 is none. With ``tty``, stdin, stdout and stderr are a terminal, of 24 rows and 80 columns or those of
        a :class:`Terminal`, and all output is ``stdout``.

        Raises :class:`ConfigError`, :class:`ImageError`, :class:`HostError`, :class:`AgentError`, and
        :class:`VMDiedError` if the virtual machine ended before the command was started.
        """
        self._open  # noqa: B018  a closed sandbox is named before a bad argument
        check_image(image)
        how = collection(
            input=input, timeout=self.options.timeout if timeout is None else timeout,
            on_stdout=on_stdout, on_stderr=on_stderr, max_output=max_output, check=check,
        )  # fmt: skip
        what = command(
            cmd, entrypoint=entrypoint, env=env, cwd=cwd, user=user, rlimits=rlimits, tty=tty, how=how
        )
        async with single_process(self._open, image, what, self._pull(pull)) as process:
            completed = await collect(process, how)
        return completed.check() if check else completed

    async def shell(
        self,
        image: str,
        script: str,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        rlimits: Rlimits | None = None,
        input: bytes | str | None = None,
        timeout: float | None = None,
        on_stdout: Callback | None = None,
        on_stderr: Callback | None = None,
        max_output: int = MAX_OUTPUT,
        check: bool = False,
        pull: PullPolicy | None = None,
    ) -> Completed:
        """Run a script in the ``/bin/sh`` of a new container: ``await sb.shell(image, "make && make test")``.

        As :meth:`run`, without the image's entrypoint.
        """
        return await self.run(
            image, entrypoint=shell(script), cmd=None, env=env, cwd=cwd, user=user, rlimits=rlimits, input=input,
            timeout=timeout, on_stdout=on_stdout, on_stderr=on_stderr, max_output=max_output, check=check,
            pull=pull,
        )  # fmt: skip

    def process(
        self,
        image: str,
        cmd: Sequence[str] | None = None,
        *,
        entrypoint: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        rlimits: Rlimits | None = None,
        tty: bool | Terminal = False,
        pull: PullPolicy | None = None,
    ) -> AbstractAsyncContextManager[Process]:
        """Start a command in a new container of ``image``; yields the running :class:`Process`.

        It is killed, with all it started, and its container goes, when the block is left. With ``tty``, its stdin,
        stdout and stderr are a terminal. ``pull`` is as for :meth:`run`. Raises :class:`ConfigError` when called, and
        what :meth:`run` raises when its block is entered.

        It may be called before the sandbox is entered. Then entering that finds the image, and makes it ready, before
        it starts anything, and raises :class:`ImageError` where that can't be done.
        """
        what = command(cmd, entrypoint=entrypoint, env=env, cwd=cwd, user=user, rlimits=rlimits, tty=tty)
        asked = Foreseen(check_image(image), self._pull(pull), what)
        if not self._entered:
            self._foreseen.append(asked)
        return self._process(asked)

    @asynccontextmanager
    async def _process(self, asked: Foreseen) -> AsyncIterator[Process]:
        async with single_process(self._open, asked.image or asked.reference, asked.what, asked.pull) as process:
            yield process

    def container(self, image: str, *, pull: PullPolicy | None = None) -> AbstractAsyncContextManager[Container]:
        """A container of ``image`` for several commands, which share its filesystem; gone when the block is left.

        ``pull`` is as for :meth:`run`.
        """
        return kept_container(self._open, check_image(image), self._pull(pull))

    @property
    def main(self) -> Container:
        """The container that a detached sandbox was started with, or that a template's setup has set up.

        Raises ConfigError if there is none.
        """
        self._open  # noqa: B018  a closed sandbox is named first
        if self._main is None:
            raise ConfigError(
                "this sandbox has no main container", hint="one detached with an image has, or of a template with setup"
            )
        return self._main

    @property
    def containers(self) -> Mapping[str, Container]:
        """In a sandbox that goes on from another one: the containers that were open in that, by their ids."""
        self._open  # noqa: B018  a closed sandbox is named first
        return dict(self._inherited)

    async def stats(self) -> Stats:
        """What the guest and its containers use at the moment. Raises :class:`AgentError`, :class:`VMDiedError`."""
        running = self._open
        await running.settled()
        running.check()
        async with running.explained():
            said = await running.agent.stats()
        return decoded(said, hidden=[one.id for one in running.containers.values() if one.fresh or one.rehearsal])

    @property
    def accel(self) -> Accel:
        """What executes the guest: ``"kvm"``, or ``"tcg"`` for emulation."""
        return self._open.vm.accel

    @property
    def isolation(self) -> Isolation:
        """``"hardware"`` under KVM, else ``"emulated"``: QEMU makes no promise that a guest can't break out of TCG."""
        return isolation_of(self.accel)

    @property
    def features(self) -> Features:
        """What the hypervisor can do."""
        return self.options.hypervisor.features

    @property
    def network(self) -> RunningNetwork:
        """Its published ports, its addresses, what it may reach."""
        return self._open.network

    @property
    def timings(self) -> Timings:
        """Where the time of the start went."""
        return self._open.timings

    @property
    def console(self) -> str:
        """The end of what the guest's kernel and agent wrote to the console."""
        return self._open.vm.console()

    def _pull(self, pull: PullPolicy | None) -> PullPolicy:
        return self.options.pull if pull is None else check_pull(pull)

    @property
    def _open(self) -> Running:
        if self._running is None:
            raise SandboxClosedError("this sandbox is not open", hint="use it inside its 'async with' block")
        return self._running
