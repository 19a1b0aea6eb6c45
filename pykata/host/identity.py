"""Whom a process of the host runs as."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from pykata.host.byte_locks import lock_byte
from pykata.host.directories import run_root

# systemd's table of uids (UIDS-GIDS.md) gives the numbers from 1879048192 on to nobody. Each VMM that root starts gets
# one of its own: processes of one uid may ptrace and signal each other and open each other's /proc/PID/fd, so a guest
# that breaks out of one VMM would hold all the others.
FIRST_UID = 1_900_000_000
UIDS = 1 << 26


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
            offset = int.from_bytes(os.urandom(8)) % UIDS
            if lock_byte(lock, offset):
                break
        yield Identity(FIRST_UID + offset, FIRST_UID + offset, tuple(groups))
    finally:
        os.close(lock)


@functools.cache        # it is written once (user_namespaces(7))
def _mapped(first: int, count: int) -> bool:
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(inside <= first and first + count <= inside + length for inside, _, length in ranges)
