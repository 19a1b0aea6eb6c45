"""Starting a detached sandbox: a process that keeps it, and that nobody has to wait for."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress

import anyio
from attrs import evolve

from pykata import host
from pykata.detached import directory as directories
from pykata.detached.directory import Claim, Directory, State
from pykata.detached.welcome import Request, to_descriptor
from pykata.detached.wire import Wire, unpack_error
from pykata.errors import ConfigError, DetachedError, DetachedTakenError, HostError, PykataError, last_line
from pykata.foreseen import ready_image
from pykata.host import finish
from pykata.isolation import check_here
from pykata.volumes import FsspecVolume

CLEAN_UP = 30.0
"""Seconds that a keeper which we give up may take to be gone."""


async def start(request: Request) -> Directory:
    """Start the keeper of a new sandbox; returns when the sandbox runs, and its main command was started.

    If it fails, or is cancelled, nothing is left. Raises what entering a sandbox raises, and DetachedTakenError.
    """
    _check(request)
    async with AsyncExitStack() as stack:
        if request.image is not None:       # here, where somebody is told how far it is, and before anything runs
            await stack.enter_async_context(
                ready_image(request.options, request.image, request.options.pull, request.command)
            )
        return await _started(evolve(request, options=evolve(request.options, progress=None)))


def _check(request: Request) -> None:
    """Refuse what can't be, or can't be here. Raises ConfigError and IsolationError."""
    directories.check_name(request.name)
    if request.command is not None and request.image is None:
        raise ConfigError("a command needs an image", hint="pass image=, or leave the command out")
    if any(isinstance(volume, FsspecVolume) for volume in request.options.volumes.values()):
        raise ConfigError("a filesystem of this program can't be a volume of a sandbox that outlives it")
    check_here(request.options)


async def _started(request: Request) -> Directory:
    command = request.command
    state = State(
        name=request.name, phase="starting", image=request.image, created=time.time(),
        args=() if command is None else (*(command.entrypoint or ()), *(command.args or ())),
    )  # fmt: skip
    with _handed_over(to_descriptor(request)) as said:
        try:
            with directories.claimed(request.name, state) as claim:
                directory = claim.directory
                async with _leash(claim, said) as leash:
                    await _ready(leash, directory)
        except DetachedTakenError:
            raise
        except BaseException:
            with suppress(PykataError):     # the keeper has removed it itself, unless it was killed
                directories.remove(directory)
            raise
    return directory


@asynccontextmanager
async def _leash(claim: Claim, said: int) -> AsyncIterator[Wire]:
    """A started keeper, which ends unless it is told to stay; then we are told, by the end of the connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wire = Wire(ours)
    try:
        with theirs, ExitStack() as stack:
            output = os.open(claim.directory.complaints, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, output)
            given = [theirs.fileno(), claim.lock, claim.listener.fileno()]
            await host.start_daemon(
                [*_python(), str(claim.directory.path), *map(str, given)], stdin=said, output=output, pass_fds=given,
                env=_environment(),
            )  # fmt: skip
            # Its own copies only: what is connected ends with the keeper.
            claim.listener.close()
        try:
            yield wire
        finally:
            await finish(_let_go(wire))
    finally:
        wire.close()


async def _ready(leash: Wire, directory: Directory) -> None:
    """Wait until the sandbox runs, and let it."""
    answer = await leash.receive()
    if answer is None:
        said = last_line(directory.complaints.read_text(errors="replace"))
        raise DetachedError(
            f"the keeper of sandbox {directory.name!r} ended before the sandbox ran{f': {said}' if said else ''}",
            name=directory.name,
        )
    if "error" in answer.body:
        raise unpack_error(answer.body["error"])
    with suppress(anyio.BrokenResourceError):       # it has ended in this moment, which its state tells
        await leash.send({"stay": True})


async def _let_go(leash: Wire) -> None:
    """Wait for the end of a keeper that wasn't told to stay, or for one that was to know it."""
    leash.end_of_sending()
    with anyio.move_on_after(CLEAN_UP):
        while await leash.receive() is not None:
            pass


def _python() -> list[str]:
    if not sys.executable:
        raise HostError("this Python doesn't know its own interpreter", hint="sys.executable is empty")
    # -P: a file in the current directory must not be taken for one of our modules.
    return [sys.executable, "-P", "-m", "pykata.keeper"]


def _environment() -> dict[str, str]:
    """Ours, with our way to find modules: the keeper must find the same pykata, and the strategies in its options."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}


@contextmanager
def _handed_over(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
