"""The host: the one place that spawns processes, makes run directories and looks tools up.

Who calls :func:`spawn` owns the process for as long as its ``async with`` block runs, whatever happens in it. A process
also dies when the thread that spawned it ends (``PR_SET_PDEATHSIG`` is about the *thread*, prctl(2)); that is the
thread of the event loop, so a process can't outlive the loop that owns it, even if that is killed with SIGKILL.
Nothing is started, opened or created by importing this module.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import ByteReceiveStream, ByteSendStream
from attrs import frozen

from pykata.errors import HostError, NotPermittedError, ToolFailedError, ToolMissingError

log = logging.getLogger(__name__)
T = TypeVar("T")

DEVNULL = subprocess.DEVNULL
PIPE = subprocess.PIPE
STDOUT = subprocess.STDOUT
TAIL = 16 * 1024                # bytes of a program's stderr that are kept for an error

Stdio = int | IO[bytes]

NO_ENV: Mapping[str, str] = MappingProxyType({})
TOOL_ENV: Mapping[str, str] = MappingProxyType({"PATH": os.defpath + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"})

# Where programs live that distributions keep out of a user's PATH: virtiofsd, and everything in sbin.
EXTRA_PATH = ("/usr/sbin", "/sbin", "/usr/libexec", "/usr/lib/qemu", "/usr/local/bin")

# systemd's table of uids (UIDS-GIDS.md) gives the numbers from 1879048192 on to nobody. Each VMM that root starts gets
# one of its own: processes of one uid may ptrace and signal each other and open each other's /proc/PID/fd, so a guest
# that breaks out of one VMM would hold all the others.
FIRST_UID = 1_900_000_000
UIDS = 1 << 26
UNKILLABLE = 30.0       # seconds after SIGKILL; only a process stuck in the kernel (state D) lasts that long


# --- directories ---


def cache_dir() -> Path:
    """The user's cache: ``$PYKATA_CACHE``, else ``$XDG_CACHE_HOME/pykata``, else ``~/.cache/pykata``."""
    if named := os.environ.get("PYKATA_CACHE"):
        path = Path(named)
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pykata"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path.absolute()


def run_root() -> Path:
    """The directory that holds the run directories of this user."""
    if named := os.environ.get("PYKATA_RUN"):
        path = Path(named)
    elif named := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(named, "pykata")
    elif os.geteuid() == 0:
        path = Path("/run/pykata")
    else:
        path = Path(tempfile.gettempdir(), f"pykata-{os.geteuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    # In /tmp anyone may have been there first: with a symlink, or with a directory of their own.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise NotPermittedError(f"{path} is not a directory that only uid {os.geteuid()} can write",
                                hint="set PYKATA_RUN to a directory of your own")
    return path.absolute()


@asynccontextmanager
async def run_dir() -> AsyncIterator[Path]:
    """A fresh directory that only we can enter; removed on exit, whatever happened in it.

    Its file ``owner`` names the process that made it, for :func:`abandoned_run_dirs`.
    """
    root, name = run_root(), secrets.token_hex(5)
    fresh, path = root / f".{name}", root / name
    fresh.mkdir(mode=0o700)
    try:
        (fresh / "owner").write_text(json.dumps(_identify(os.getpid())))
        fresh.rename(path)      # by now it has an owner: a gc never sees it without one
        yield path
    finally:
        await finish(asyncio.to_thread(_remove, fresh, path))


def abandoned_run_dirs() -> list[Path]:
    """Run directories whose process has ended without removing them: it was killed."""
    return [path for path in sorted(run_root().iterdir()) if not path.name.startswith(".") and not _owned(path)]


def _owned(path: Path) -> bool:
    try:
        owner = json.loads((path / "owner").read_text())
        return bool(owner == _identify(int(owner["pid"])))
    except FileNotFoundError:
        return not (path / "owner").parent.is_dir()     # being removed by its owner right now
    except (ValueError, TypeError, KeyError, ProcessLookupError):
        return False


def _identify(pid: int) -> dict[str, str | int]:
    """What tells this process from a later one with the same pid. Raises ProcessLookupError."""
    try:
        # proc_pid_stat(5): the name (2) may hold blanks and parentheses; state is field 3, starttime field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"pid": pid, "start": int(fields[19]), "boot": boot}


def _remove(*paths: Path) -> None:
    for path in paths:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            pass
        except OSError as exc:
            log.warning("can't remove %s: %s", path, exc)


# --- tools ---


def find_tool(name: str, *, package: str, env_var: str | None = None) -> Path:
    """The path of the program ``name``, or what the environment variable ``env_var`` names instead.

    Raises :class:`~pykata.errors.ToolMissingError`, with the Debian ``package`` that has it as the hint.
    """
    if env_var and (named := os.environ.get(env_var)):
        found = shutil.which(named)
        if found is None:
            raise ToolMissingError(f"{env_var}={named!r} is not a program", hint=f"unset {env_var}, or correct it")
        return Path(found).absolute()
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(EXTRA_PATH))
    if found is None:
        raise ToolMissingError(f"{name} is not installed", hint=f"apt-get install {package}")
    return Path(found).absolute()


@frozen
class Identity:
    """Whom a process runs as: unprivileged, without any capability. ``uid`` None keeps the caller's uid and gid."""

    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()


@contextmanager
def ephemeral_identity(*, groups: Collection[int] = ()) -> Iterator[Identity | None]:
    """A uid that no other process of this host has, for as long as the block runs; None for who isn't root.

    ``groups`` are supplementary groups that it needs all the same, such as the one of ``/dev/kvm``.
    """
    if os.geteuid() != 0:
        yield None
        return
    if not _mapped(FIRST_UID, UIDS):    # root of a user namespace: there is no other uid, but capabilities can go
        yield Identity()
        return
    # A lock on one byte of a file reserves the number; the kernel frees it with the description, however we end.
    lock = os.open(run_root() / ".uids", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            offset = secrets.randbelow(UIDS)
            with suppress(BlockingIOError):
                request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)   # struct flock
                fcntl.fcntl(lock, fcntl.F_OFD_SETLK, request)
                break
        yield Identity(FIRST_UID + offset, FIRST_UID + offset, tuple(groups))
    finally:
        os.close(lock)


def _mapped(first: int, count: int) -> bool:
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(inside <= first and first + count <= inside + length for inside, _, length in ranges)


# --- processes ---


@frozen
class KillPolicy:
    """How a process is ended. ``grace`` is the time in seconds it has between ``signal`` and SIGKILL."""

    name: str
    signal: signal.Signals
    grace: float = 0.0


KILL = KillPolicy("kill", signal.SIGKILL)
TERM = KillPolicy("terminate, then kill", signal.SIGTERM, grace=2.0)


class PipeReader(ByteReceiveStream):
    """Our end of a pipe that the process writes to. Reads what is asked for and no more, so it has backpressure."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        os.set_blocking(pipe.fileno(), False)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        while True:
            if self._pipe.closed:
                raise anyio.ClosedResourceError
            try:
                data = os.read(self._pipe.fileno(), max_bytes)
            except BlockingIOError:
                await anyio.wait_readable(self._pipe.fileno())
                continue
            if not data:
                raise anyio.EndOfStream
            await anyio.lowlevel.checkpoint()
            return data

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        if not self._pipe.closed:
            anyio.notify_closing(self._pipe.fileno())
            self._pipe.close()


class PipeWriter(ByteSendStream):
    """Our end of the pipe that the process reads from."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        os.set_blocking(pipe.fileno(), False)

    async def send(self, item: bytes) -> None:
        view = memoryview(item)
        while view:
            if self._pipe.closed:
                raise anyio.ClosedResourceError
            try:
                view = view[os.write(self._pipe.fileno(), view):]
            except BlockingIOError:
                await anyio.wait_writable(self._pipe.fileno())
            except BrokenPipeError as exc:
                raise anyio.BrokenResourceError from exc
        await anyio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        if not self._pipe.closed:
            anyio.notify_closing(self._pipe.fileno())
            self._pipe.close()


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
    kill: KillPolicy = TERM,
) -> AsyncIterator[HostProcess]:
    """Run a program for as long as the block runs, then end it by the ``kill`` policy and reap it.

    It leads a session of its own (Ctrl-C at the terminal is ours to handle), gets no environment but ``env`` and no
    descriptors but stdio and ``pass_fds``. Raises :class:`~pykata.errors.ToolMissingError`; what goes wrong later in
    starting it is an exit code of 126 or 127.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise ToolMissingError(f"{argv[0]} is not a program")
    command = [*_setpriv(identity), str(program), *map(str, argv[1:])]
    log.debug("spawn: %s", shlex.join(command))
    # There is no await between here and the try: a process that isn't owned never exists. Popen blocks for the ~1 ms
    # of a vfork and execve.
    try:
        popen = subprocess.Popen(  # noqa: ASYNC220
            command, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=pass_fds, env=env, cwd=cwd, bufsize=0,
            start_new_session=True,
        )
    except OSError as exc:
        raise HostError(f"can't run {program}: {exc}") from exc
    process = HostProcess(popen)
    try:
        yield process
    finally:
        await finish(process._end(kill))


def _setpriv(identity: Identity | None) -> list[str]:
    """The prefix that gives up privileges and binds the process to our thread. It costs 1.2 ms.

    A child of ours could call prctl itself only in a ``preexec_fn``, which is unsafe beside threads and rules vfork
    out. setpriv sets the parent-death signal last, so it survives the change of uid, which clears it. If we end in
    the millisecond before, nothing tells the process: its run directory is then found by ``abandoned_run_dirs``.
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


async def run_tool(
    argv: Sequence[str | Path],
    *,
    input: bytes | None = None,
    timeout: float | None = None,
    env: Mapping[str, str] = TOOL_ENV,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    limit: int = 16 * 1024 * 1024,
) -> bytes:
    """Run a program to its end and return what it wrote to stdout, at most ``limit`` bytes.

    Raises :class:`~pykata.errors.ToolFailedError` with the tail of stderr if it ends with another code than 0, writes
    more, or takes longer than ``timeout`` seconds.
    """
    name = Path(argv[0]).name
    out, err = bytearray(), bytearray()

    def failed(why: str) -> ToolFailedError:
        return ToolFailedError(f"{name} {why}", output=bytes(err or out)[-TAIL:].decode(errors="backslashreplace"))

    async def feed(stream: PipeWriter, data: bytes) -> None:
        async with stream:
            with suppress(anyio.BrokenResourceError):       # it doesn't want all of it; its exit code tells
                await stream.send(data)

    async def collect(stream: PipeReader, into: bytearray, most: int) -> None:
        async for chunk in stream:
            into += chunk
            if into is out and len(into) > most:
                scope.cancel()
                return
            del into[:-most]

    stdin = DEVNULL if input is None else PIPE
    async with spawn(argv, stdin=stdin, stdout=PIPE, stderr=PIPE, env=env, cwd=cwd, pass_fds=pass_fds) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        with anyio.move_on_after(timeout) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(collect, process.stdout, out, limit)
                tasks.start_soon(collect, process.stderr, err, TAIL)
                if process.stdin is not None and input is not None:
                    tasks.start_soon(feed, process.stdin, input)
            await process.wait()
    if len(out) > limit:
        raise failed(f"wrote more than {limit} bytes")
    if scope.cancelled_caught:
        raise failed(f"took longer than {timeout} s")
    if process.returncode:
        raise failed(describe_exit(process.returncode))
    return bytes(out)


def describe_exit(returncode: int) -> str:
    """How a process ended, in words: "was killed by SIGKILL", "exited with code 1"."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


# --- clean-up ---


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run clean-up to its end: neither a cancel scope nor ``Task.cancel`` (however often) interrupts it.

    A shielded scope alone holds off anyio's cancellation, but not asyncio's own. What was held off is raised
    afterwards.
    """
    task = asyncio.ensure_future(work)
    held: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as exc:
                held = exc
    if held is not None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.error("clean-up failed", exc_info=failure)
        raise held
    return task.result()

