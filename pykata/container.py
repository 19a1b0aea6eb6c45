"""One root filesystem in a sandbox, and the processes in it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from pykata.background import Background
from pykata.collect import collect
from pykata.command import MAX_OUTPUT, Callback, Command, collection, command, shell
from pykata.completed import Completed
from pykata.errors import ConfigError, SandboxClosedError
from pykata.files import FileChange, Files
from pykata.files.checks import number
from pykata.host import finish
from pykata.making import removed, saved_container
from pykata.options import Rlimits
from pykata.paths import check_path
from pykata.process import Process
from pykata.running import Running
from pykata.spec import Image, PullPolicy, Terminal
from pykata.starting import detached, started

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
        """Raise :class:`SandboxClosedError` if its block was left, ShareLostError if its root filesystem is lost."""
        if self._left:
            raise SandboxClosedError("this container is gone", hint="use it inside its 'async with' block")
        self._running.check_root(self.image)

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

        await self._running.settled()
        self._running.check()
        request = start_request(self._running, self.id, args, what, user=self.image.config.user)
        async with started(self._running, request, self.image) as process:
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

    async with prepared(running, image, pull) as rootfs, removed(running, running.new_id("c")) as identity:
        async with running.explained(rootfs.image):
            await running.agent.create_container(container_request(running, identity, rootfs))
        container = Container(running, identity, rootfs.image)
        running.containers[identity] = saved_container(running, identity, rootfs.image)
        try:
            yield container
        finally:
            running.containers.pop(identity, None)
            await container.leave()


def inherited(running: Running) -> list[Container]:
    """The containers that were there before the sandbox was entered, for whoever wants to use them."""
    return [
        Container(running, one.id, Image(one.reference, one.digest, one.config, one.architecture))
        for one in running.containers.values() if not one.fresh and not one.rehearsal
    ]  # fmt: skip
