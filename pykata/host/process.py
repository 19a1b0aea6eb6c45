"""The one place that spawns processes; each is owned by the block that spawned it."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO

import anyio
from attrs import frozen

from pykata.errors import HostError, ToolMissingError
from pykata.host import pages
from pykata.host.cleanup import finish
from pykata.host.identity import Identity
from pykata.host.orphans import path_unless_orphaned, unless_orphaned
from pykata.host.pipes import PipeReader, PipeWriter
from pykata.host.tools import find_tool

log = logging.getLogger(__name__)

DEVNULL = subprocess.DEVNULL
PIPE = subprocess.PIPE
STDOUT = subprocess.STDOUT
Stdio = int | IO[bytes]

NO_ENV: Mapping[str, str] = MappingProxyType({})
TOOL_ENV: Mapping[str, str] = MappingProxyType({"PATH": os.defpath + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"})

UNKILLABLE = 30.0       # seconds after SIGKILL; only a process stuck in the kernel (state D) lasts that long


@frozen
class KillPolicy:
    """How a process is ended. ``grace`` is the time in seconds it has between ``signal`` and SIGKILL."""

    name: str
    signal: signal.Signals
    grace: float = 0.0


KILL = KillPolicy("kill", signal.SIGKILL)
TERM = KillPolicy("terminate, then kill", signal.SIGTERM, grace=2.0)


class HostProcess:
    """A process of the host that :func:`spawn` started. Its pid stays its own until the block of ``spawn`` is left."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.pid = popen.pid
        self.stdin = PipeWriter(popen.stdin) if popen.stdin else None
        self.stdout = PipeReader(popen.stdout) if popen.stdout else None
        self.stderr = PipeReader(popen.stderr) if popen.stderr else None
        self.returncode: int | None = None
        """None while it runs, the exit code, or minus the number of the signal that ended it."""
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        self._exited = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._notice)

    async def wait(self) -> int:
        """Wait until it has ended; returns :attr:`returncode`."""
        await self._exited.wait()
        assert self.returncode is not None
        return self.returncode

    def has_ended(self) -> bool:
        """Whether it has ended. The kernel is asked: :attr:`returncode` is only set when the event loop gets to it."""
        if self.returncode is None:
            self._notice()
        return self.returncode is not None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and its children (it leads a process group), unless it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _notice(self) -> None:
        # WNOWAIT leaves the zombie: as long as it is there, neither its pid nor its group can become someone else's.
        try:
            status = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:       # the application ignores SIGCHLD or waits for any child
            log.warning("something else reaped process %d", self.pid)
            self.returncode = 255
        else:
            if status is None:
                return
            self.returncode = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        self._loop.remove_reader(self._pidfd)
        self._exited.set()

    async def _end(self, policy: KillPolicy) -> None:
        """End it and everything of its process group, reap it, close what we hold of it."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        if policy.grace and self.returncode is None:
            self.send_signal(policy.signal)
            with anyio.move_on_after(policy.grace):
                await self._exited.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)     # also when it has ended: its children may run on
        with anyio.move_on_after(UNKILLABLE):
            await self._exited.wait()
        self._loop.remove_reader(self._pidfd)
        if self.returncode is None:
            log.error("process %d is still there %.0f s after SIGKILL", self.pid, UNKILLABLE)
        else:
            with suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)  # noqa: ASYNC222 - it has ended
        self._popen.returncode = self.returncode if self.returncode is not None else -signal.SIGKILL
        os.close(self._pidfd)


@asynccontextmanager
async def spawn(
    argv: Sequence[str | Path],
    *,
    stdin: Stdio = DEVNULL,
    stdout: Stdio = DEVNULL,
    stderr: Stdio = DEVNULL,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] = NO_ENV,
    cwd: Path | None = None,
    identity: Identity | None = None,
    through: Sequence[str] = (),
    small_pages: bool = False,
    quick: bool = False,
    kill: KillPolicy = TERM,
) -> AsyncIterator[HostProcess]:
    """Run a program for as long as the block runs, then end it by the ``kill`` policy and reap it.

    It leads a session of its own (Ctrl-C at the terminal is ours to handle), gets no environment but ``env`` and no
    descriptors but stdio and ``pass_fds``. ``through`` is a command that becomes the one after it, before privileges
    are given up; ``small_pages``: see :mod:`.pages`; ``quick``: 0.5 ms sooner, for a program that doesn't mind an odd
    path to it as its ``argv[0]``. It isn't executed, or killed, if our thread ends. Raises
    :class:`~pykata.errors.ToolMissingError`; what goes wrong later in starting it is an exit code of 126 or 127.
    """
    program = shutil.which(str(argv[0]))
    if program is None:
        raise ToolMissingError(f"{argv[0]} is not a program")
    before, arguments = [*through, *_setpriv(identity)], [*map(str, argv[1:])]
    if log.isEnabledFor(logging.DEBUG):     # to quote all of it takes a while
        log.debug("spawn: %s", shlex.join([*before, program, *arguments]))
    other_user = identity is not None and identity.uid is not None
    checked = path_unless_orphaned(program, other_user=other_user) if quick else unless_orphaned(program)
    command = [*before, *checked, *arguments]
    # There is no await between here and the try: a process that isn't owned never exists. Popen blocks for the ~1 ms
    # of a vfork and execve.
    try:
        with pages.small_pages(small_pages):
            popen = subprocess.Popen(  # noqa: ASYNC220
                command, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=pass_fds, env=env, cwd=cwd, bufsize=0,
                start_new_session=True,
            )
    except OSError as exc:
        raise HostError(f"can't run {program}: {exc}") from exc
    try:
        process = HostProcess(popen)
    except OSError as exc:
        popen.kill()
        popen.communicate()
        raise HostError(f"can't watch {program}: {exc}") from exc
    try:
        yield process
    finally:
        await finish(process._end(kill))


def _setpriv(identity: Identity | None) -> list[str]:
    """The prefix that gives up privileges and binds the process to our thread. It costs 1.2 ms.

    A child of ours could call prctl itself only in a ``preexec_fn``, which is unsafe beside threads and rules vfork
    out. setpriv sets the parent-death signal last, so it survives the change of uid, which clears it. If we end in
    the millisecond before, nothing tells the process: so it looks itself afterwards, see :mod:`.orphans`.
    """
    setpriv = [str(_find_setpriv())]
    if identity is not None:
        if identity.uid is not None:
            groups = ["--groups", ",".join(map(str, identity.groups))] if identity.groups else ["--clear-groups"]
            setpriv += ["--reuid", str(identity.uid), "--regid", str(identity.gid), *groups]
        setpriv += ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    return [*setpriv, "--pdeathsig", "KILL", "--"]


@functools.cache
def _find_setpriv() -> Path:
    return find_tool("setpriv", package="util-linux")


def describe_exit(returncode: int) -> str:
    """How a process ended, in words: "was killed by SIGKILL", "exited with code 1"."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
