"""Network namespaces: made, found, entered, and kept under a name that outlives us (network_namespaces(7))."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

from attrs import field, frozen

from pykata.errors import HostError, NetworkError, NotPermittedError
from pykata.host import finish

NAMED = Path("/run/netns")
"""Where iproute2 keeps namespaces that have a name."""

OURS = Path("/proc/thread-self/ns/net")
CLONE_NEWNET = 0x40000000
MS_BIND, MNT_DETACH = 0x1000, 2
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
NS_GET_NSTYPE = 0xB703

CAPABILITIES = {"NET_ADMIN": 12, "NET_RAW": 13, "SYS_ADMIN": 21, "MKNOD": 27}


@frozen
class Netns:
    """An open network namespace. ``path`` is what a user would call it, ``identity`` tells it from all others."""

    fd: int = field(eq=False)
    path: str = field(eq=False)
    identity: str
    opener: Callable[[Mapping[str, object]], int] | None = field(default=None, eq=False, repr=False)
    """What opens things in it for us, where we may not enter it: see :mod:`.rootless`."""

    user_fd: int | None = field(default=None, eq=False, repr=False)
    """The user namespace to which it belongs, where that isn't ours."""

    @property
    def way_in(self) -> list[str]:
        """The arguments of nsenter(1) that lead into it."""
        if self.user_fd is None:
            return [f"--net={self.proc_path}"]
        return [f"--user=/proc/{os.getpid()}/fd/{self.user_fd}", "--preserve-credentials", f"--net={self.proc_path}"]

    @property
    def proc_path(self) -> str:
        """A path of it for other processes, good as long as we have it open."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"


def require(*capabilities: str) -> None:
    """Raise NotPermittedError if this process lacks one of them, such as ``"NET_ADMIN"`` (capabilities(7))."""
    status = Path("/proc/thread-self/status").read_text()
    held = int(status.partition("CapEff:")[2].split()[0], 16)
    lacking = [f"CAP_{each}" for each in capabilities if not held >> CAPABILITIES[each] & 1]
    if lacking:
        raise NotPermittedError(f"this process lacks {' and '.join(lacking)}, which this network needs",
                                hint='run it as root; network="user" works without privileges')


@contextmanager
def opened(where: str | Path | None = None) -> Iterator[Netns]:
    """The namespace at a path, or of a name that ``ip netns`` knows; None is the one that we are in.

    Raises NetworkError, NotPermittedError.
    """
    path = OURS if where is None else NAMED / where if isinstance(where, str) and "/" not in where else Path(where)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as exc:
        raise NotPermittedError(f"can't open the network namespace {path}: {exc.strerror}") from exc
    except OSError as exc:
        raise NetworkError(f"there is no network namespace {path}: {exc.strerror}",
                           hint="'ip netns' lists those with names; that of a process is /proc/PID/ns/net") from exc
    try:
        yield checked(fd, str(path))
    finally:
        os.close(fd)


def checked(fd: int, path: str) -> Netns:
    """The namespace behind a descriptor. Raises NetworkError."""
    kind = 0
    with suppress(OSError):
        kind = fcntl.ioctl(fd, NS_GET_NSTYPE)
    if kind != CLONE_NEWNET:
        raise NetworkError(f"{path} is not a network namespace")
    found = os.fstat(fd)
    return Netns(fd, path, f"{found.st_dev}:{found.st_ino}")


@asynccontextmanager
async def made(pin: Path | None = None) -> AsyncIterator[Netns]:
    """A new namespace, its loopback up, for as long as the block runs. Raises HostError.

    With ``pin`` it is at that path, too: other programs find it there, and it stays if we are killed. Else it goes
    with the last descriptor and process that has it.
    """
    with ExitStack() as stack:
        if pin is not None:
            stack.callback(unpin, pin)
        # In a thread: when many are made at a time, each waits for a lock of the kernel's.
        made_here: list[int] = []
        await finish(asyncio.to_thread(_make, stack, made_here, pin))
        fd = made_here[0]
        yield checked(fd, str(pin or f"/proc/{os.getpid()}/fd/{fd}"))


def _make(stack: ExitStack, made_here: list[int], pin: Path | None) -> None:
    """The descriptor belongs to the ``stack`` as soon as it is there: a caller that is cancelled gets no answer."""
    try:
        with _away("unshare", CLONE_NEWNET):
            fd = os.open(OURS, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            made_here.append(fd)
            _loopback_up()
        if pin is not None:
            pin.touch(mode=0o600)
            source = os.fsencode(f"/proc/self/fd/{fd}")
            _call("mount", source, os.fsencode(pin), None, MS_BIND, None)
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.EACCES):
            raise NotPermittedError(f"can't make a network namespace: {exc.strerror}",
                                    hint="it takes CAP_SYS_ADMIN") from exc
        raise HostError(f"can't make a network namespace: {exc.strerror}") from exc


async def pinned(path: Path) -> None:
    """Make a namespace that stays at ``path``, until it is taken away by :func:`unpin`. Raises HostError."""
    with ExitStack() as stack:
        await finish(asyncio.to_thread(_make, stack, [], path))


async def unpinned(path: str) -> None:
    """What undoes a pin, from a record."""
    unpin(Path(path))


def unpin(path: Path) -> None:
    """Take a namespace away from its path, as far as it is there."""
    with suppress(OSError):
        _call("umount2", os.fsencode(path), MNT_DETACH)
    path.unlink(missing_ok=True)


@contextmanager
def inside(netns: Netns) -> Iterator[None]:
    """This thread is in the namespace while the block runs. What is opened there stays there; never await in it.

    Raises NotPermittedError.
    """
    here = os.stat(OURS)
    if netns.identity == f"{here.st_dev}:{here.st_ino}":
        yield       # nobody needs a privilege to stay
        return
    try:
        with _away("setns", netns.fd, CLONE_NEWNET):
            yield
    except _EntryError as exc:
        raise NotPermittedError(f"can't enter the network namespace {netns.path}: {exc}",
                                hint="it takes CAP_SYS_ADMIN") from exc


def socket_in(netns: Netns, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket of the namespace. Raises NotPermittedError, OSError."""
    if netns.opener is not None:
        return socket.socket(fileno=netns.opener({"socket": [family, kind, protocol]}))
    with inside(netns):
        return socket.socket(family, kind, protocol)


def opened_in(netns: Netns, path: Path, flags: int) -> int:
    """A descriptor of a device that belongs to where it is opened. Raises NotPermittedError, OSError."""
    if netns.opener is not None:
        return netns.opener({"open": str(path), "flags": flags})
    with inside(netns):
        return os.open(path, flags)


class _EntryError(OSError):
    """The other namespace couldn't be entered."""


@contextmanager
def _away(call: str, *arguments: object) -> Iterator[None]:
    """The thread is somewhere else, and comes back."""
    own = os.open(OURS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            _call(call, *arguments)
        except OSError as exc:
            raise _EntryError(exc.errno, exc.strerror) from exc
        try:
            yield
        finally:
            _call("setns", own, CLONE_NEWNET)
    finally:
        os.close(own)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))


_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
