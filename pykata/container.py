"""One root filesystem in a sandbox, and the processes in it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from attrs import define

from pykata.background import Background
from pykata.collect import collect
from pykata.command import MAX_OUTPUT, Callback, Command, collection, command, shell
from pykata.completed import Completed
from pykata.errors import AgentError, ConfigError, SandboxClosedError
from pykata.files import FileChange, Files
from pykata.files.checks import number
from pykata.host import finish
from pykata.options import Rlimits, check_path
from pykata.origin import SavedContainer
from pykata.process import Process
from pykata.running import ProcessId, Running
from pykata.spec import Image, PullPolicy, Terminal

if TYPE_CHECKING:
    from pykata.agent.v1 import Start
    from pykata.rootfs import Prepared

KEPT_LOG = 64 * 1024
"""Bytes of the output of a background process that are kept at most: agent.proto."""

MAX_CHANGES = 1_000_000
"""Changes that one ``changes`` takes into memory unless told otherwise."""

MAX_LAYER = 16 * 1024**3
"""Bytes of the layer that ``export_changes`` writes unless told otherwise."""


class Container:
    """A container that stays for several commands. Made by ``sb.container(image)``."""

    def __init__(self, running: Running, identity: str, image: Image) -> None:
        self._running = running
        self.id = identity
        """Its name in the guest."""
        self.image = image
        """What it was made from."""
        self.files = Files(running, identity, image.config.user, self.check)
        """Its files, as the user that its commands run as."""
        self._left = False

    async def leave(self) -> None:
        """Its block is left."""
        self._left = True
        await finish(self.files.aclose())

    def check(self) -> None:
        """Raise :class:`SandboxClosedError` if its block was left."""
        if self._left:
            raise SandboxClosedError("this container is gone", hint="use it inside its 'async with' block")

    async def run(
        self,
        cmd: Sequence[str],
        *,
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
    ) -> Completed:
        """Run a command in this container to its end; what it changes in the filesystem stays for the next one.

        As :meth:`Sandbox.run`, without the image's entrypoint. What the command has started in the background lives on,
        until the container is left.
        """
        how = collection(
            input=input, timeout=self._running.options.timeout if timeout is None else timeout,
            on_stdout=on_stdout, on_stderr=on_stderr, max_output=max_output, check=check,
        )  # fmt: skip
        what = command(cmd, env=env, cwd=cwd, user=user, rlimits=rlimits, tty=tty, how=how)
        async with self._process(what) as process:
            completed = await collect(process, how)
        return completed.check() if how.check else completed

    async def shell(
        self,
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
    ) -> Completed:
        """Run a script in the container's ``/bin/sh``: ``await container.shell("make && make test")``.

        As :meth:`run`.
        """
        return await self.run(
            shell(script), env=env, cwd=cwd, user=user, rlimits=rlimits, input=input, timeout=timeout,
            on_stdout=on_stdout, on_stderr=on_stderr, max_output=max_output, check=check,
        )  # fmt: skip

    @asynccontextmanager
    async def process(
        self,
        cmd: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        rlimits: Rlimits | None = None,
        tty: bool | Terminal = False,
    ) -> AsyncIterator[Process]:
        """Start a command in this container; it and its descendants are killed when the block is left.

        With ``tty``, its stdin, stdout and stderr are a terminal, which hangs up before that.
        """
        async with self._process(command(cmd, env=env, cwd=cwd, user=user, rlimits=rlimits, tty=tty)) as process:
            yield process

    async def start(
        self,
        cmd: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        rlimits: Rlimits | None = None,
        log: int = KEPT_LOG,
    ) -> Background:
        """Start a command that runs until it ends or the container is left: a server, say.

        Its stdin is empty. The last ``log`` bytes of what it writes are kept in the guest, at most 64 KiB; with 0 its
        output goes to ``/dev/null``.
        """
        what = command(cmd, env=env, cwd=cwd, user=user, rlimits=rlimits)
        if not isinstance(log, int) or isinstance(log, bool) or not 0 <= log <= KEPT_LOG:
            raise ConfigError(f"log={log!r} is not a number of bytes that can be kept", hint=f"from 0 to {KEPT_LOG}")
        args = self._args(what)
        from pykata.requests import detached_request

        return await detached(
            self._running, detached_request(self._running, self.id, args, what, user=self.image.config.user, log=log)
        )

    @asynccontextmanager
    async def _process(self, what: Command) -> AsyncIterator[Process]:
        args = self._args(what)
        from pykata.requests import start_request

        request = start_request(self._running, self.id, args, what, user=self.image.config.user)
        async with started(self._running, request) as process:
            yield process

    def _args(self, what: Command) -> tuple[str, ...]:
        self.check()
        if what.args is None:
            raise ConfigError("cmd=None is no command", hint="a container that stays has no command of its own")
        return what.args

    async def changes(self, *, limit: int = MAX_CHANGES) -> list[FileChange]:
        """What differs from the image by now, sorted by path; more than ``limit`` changes are an error.

        Raises :class:`FileError`.
        """
        from pykata.files.changes import changes

        self.check()
        return await changes(self._running, self.id, number("limit", limit))

    async def export_changes(self, target: str | os.PathLike[str], *, max_size: int = MAX_LAYER) -> str:
        """Write what differs from the image to the file ``target``, as a layer of an OCI image: an uncompressed tar.

        Returns its digest, ``"sha256:..."``, which is the layer's ``diff_id``. The file is as trustworthy as the
        container. It is there when it is complete. Raises :class:`FileError`, :class:`HostError`,
        :class:`DiskFullError`.
        """
        from pykata.files.changes import export

        self.check()
        place, most = check_path("target", target), number("max_size", max_size)
        return await export(self._running, self.id, place, most)


@asynccontextmanager
async def kept_container(
    running: Running, image: str | Image, pull: PullPolicy | None = None
) -> AsyncIterator[Container]:
    """A container without a command, until the block is left."""
    running.check()
    from pykata.requests import container_request
    from pykata.rootfs import prepared

    async with prepared(running, image, pull) as rootfs, _removed(running, running.new_id("c")) as identity:
        async with running.explained():
            await running.agent.create_container(container_request(running, identity, rootfs))
        container = Container(running, identity, rootfs.image)
        running.containers[identity] = saved_container(running, identity, rootfs.image)
        try:
            yield container
        finally:
            running.containers.pop(identity, None)
            await container.leave()


def saved_container(
    running: Running, identity: str, image: Image, *, fresh: bool = False, rehearsal: bool = False
) -> SavedContainer:
    """What a sandbox that goes on from this one has to know of a container."""
    return SavedContainer(
        id=identity, reference=image.reference, digest=image.digest, config=image.config,
        architecture=image.architecture, disk=running.options.disk, fresh=fresh, rehearsal=rehearsal,
    )  # fmt: skip


@asynccontextmanager
async def fresh_container(
    running: Running, rootfs: Prepared, *, explored: bool = False, rehearsal: bool = False
) -> AsyncIterator[None]:
    """A container that nothing has run in, and in which a process waits for a command.

    ``explored``: it has looked up what that may be, which takes long and is worth it in a guest that will be saved.
    ``rehearsal``: it is for that, and for nobody else.
    """
    from pykata.requests import container_request

    identity = running.new_id("c")
    running.containers[identity] = saved_container(
        running, identity, rootfs.image, fresh=not rehearsal, rehearsal=rehearsal
    )
    try:
        async with running.explained():
            request = container_request(running, identity, rootfs, waits=True, explored=explored)
            await running.agent.create_container(request)
        yield
    finally:
        if running.containers.pop(identity, None) is not None:      # else it is theirs who took it
            await finish(remove_container(running, identity))


def inherited(running: Running) -> list[Container]:
    """The containers that were there before the sandbox was entered, for whoever wants to use them."""
    return [
        Container(running, one.id, Image(one.reference, one.digest, one.config, one.architecture))
        for one in running.containers.values() if not one.fresh and not one.rehearsal
    ]  # fmt: skip


@asynccontextmanager
async def single_process(
    running: Running, image: str | Image, what: Command, pull: PullPolicy | None = None
) -> AsyncIterator[Process]:
    """A process in a container of its own, in one round trip; the container goes with it."""
    running.check()
    from pykata.requests import container_request, start_request
    from pykata.rootfs import prepared

    async with prepared(running, image, pull) as rootfs, _new_or_waiting(running, rootfs.image) as own:
        config = rootfs.image.config
        args = what.argv(config)
        create = None if own.fresh else container_request(running, own.id, rootfs)
        start = start_request(running, own.id, args, what, user=config.user, create=create, last=own.fresh)
        async with started(running, start) as process:
            yield process
        own.is_gone = process.ended     # the agent ends such a call well when it has removed the container
    if running.waiting is not None:
        running.waiting.ran(rootfs.image)


@asynccontextmanager
async def started(running: Running, start: Start) -> AsyncIterator[Process]:
    """Start a process; its stream is reset when left early, which kills it."""
    running.check()
    assert start.process is not None
    identity = ProcessId(start.container_id, start.process.id)
    args, tty = tuple(start.process.args), start.process.terminal is not None
    async with AsyncExitStack() as stack:
        async with running.explained():
            stream = await stack.enter_async_context(running.agent.run(start))
            pid = await stream.started()
        process = Process(running, stream, identity, args, pid, tty=tty)
        try:
            yield process
        finally:
            process.leave()
        if process.ended:
            async with running.explained():
                await stream.finished()


async def detached(running: Running, start: Start) -> Background:
    """Start a process that outlives this call."""
    running.check()
    assert start.process is not None
    async with running.explained(), running.agent.run(start) as stream:
        pid = await stream.started()
        await stream.finished()
    return Background(
        running, ProcessId(start.container_id, start.process.id), tuple(start.process.args), pid
    )


@define
class _Own:
    """A container for one process. ``fresh``: it is there already. ``is_gone``: it is known to be removed."""

    id: str
    fresh: bool
    is_gone: bool = False


@asynccontextmanager
async def _new_or_waiting(running: Running, image: Image) -> AsyncIterator[_Own]:
    fresh = await running.take_fresh(image)
    own = _Own(fresh or running.new_id("c"), fresh is not None)
    try:
        yield own
    finally:
        if not own.is_gone:
            await finish(remove_container(running, own.id))


@asynccontextmanager
async def _removed(running: Running, identity: str) -> AsyncIterator[str]:
    """See to it that the container is gone before its disk is unplugged, whatever happened.

    A guest that doesn't manage that can't be trusted with its disk slots any more: the sandbox is marked broken.
    """
    try:
        yield identity
    finally:
        await finish(remove_container(running, identity))


async def remove_container(running: Running, identity: str) -> None:
    """See to it that a container is gone; a guest that doesn't manage that is marked broken. Never fails."""
    if running.broken is not None:
        return
    if running.is_paused:
        running.broken = SandboxClosedError("a container was left while this sandbox was paused",
                                            hint="resume it before its containers are left")
        return
    try:
        await running.agent.remove_container(identity)
    except AgentError as error:
        await running.why(error)
