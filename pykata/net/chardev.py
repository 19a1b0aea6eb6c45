"""The character device of a macvtap, opened in whatever namespace it is.

Its number is in the sysfs of its namespace, and devtmpfs has nodes of all namespaces under the same names. So both are
asked and made in file systems of our own, that are mounted nowhere (fsopen(2), fsmount(2)) and go with a descriptor.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from pykata.errors import NetworkError, NotPermittedError
from pykata.net.netns import Netns, inside

SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432       # the same on every architecture
CLOEXEC, CMD_CREATE = 1, 6


def open_macvtap(netns: Netns, name: str, index: int) -> int:
    """A descriptor like that of a tap. Raises NotPermittedError, NetworkError."""
    try:
        with inside(netns), _mounted("sysfs") as sysfs:
            number = _number(sysfs, f"devices/virtual/net/{name}", f"tap{index}")
        with _mounted("tmpfs") as folder:
            os.mknod("tap", stat.S_IFCHR | 0o600, number, dir_fd=folder)
            return os.open("tap", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except PermissionError as exc:
        raise NotPermittedError(f"can't open the device of the macvtap {name}: {exc.strerror}",
                                hint="it takes CAP_SYS_ADMIN, CAP_MKNOD, and a cgroup that allows it") from exc
    except OSError as exc:
        raise NetworkError(f"can't open the device of the macvtap {name}: {exc}") from exc


def _number(sysfs: int, link: str, device: str) -> int:
    for place in (f"{link}/{device}/dev", f"{link}/macvtap/{device}/dev"):
        try:
            fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC, dir_fd=sysfs)
        except FileNotFoundError:
            continue
        with os.fdopen(fd) as file:
            major, _, minor = file.read().partition(":")
            return os.makedev(int(major), int(minor))
    raise FileNotFoundError(2, f"sysfs knows no {device} of {link}")


@contextmanager
def _mounted(kind: str) -> Iterator[int]:
    """The root of a new mount of a file system, which nobody else sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    context = _checked(libc.syscall(SYS_FSOPEN, kind.encode(), CLOEXEC))
    try:
        _checked(libc.syscall(SYS_FSCONFIG, context, CMD_CREATE, None, None, 0))
        root = _checked(libc.syscall(SYS_FSMOUNT, context, CLOEXEC, 0))
    finally:
        os.close(context)
    try:
        yield root
    finally:
        os.close(root)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
