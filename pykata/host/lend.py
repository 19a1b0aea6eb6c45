"""Lending a directory to a process that runs as someone else: as a descriptor, with its files' owner exchanged."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from pykata.errors import HostError, NotPermittedError
from pykata.host.identity import Identity
from pykata.host.process import KILL, PIPE, TOOL_ENV, spawn
from pykata.host.tools import find_tool

AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE = 1
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_IDMAP = 1, 2, 4, 0x00100000
SYS_OPEN_TREE, SYS_MOUNT_SETATTR = 428, 442     # the same on every architecture


@asynccontextmanager
async def lent_directory(path: Path, identity: Identity | None, *, readonly: bool) -> AsyncIterator[int]:
    """A descriptor of the directory for a process that runs as ``identity``; None is ourselves.

    What belongs to the directory's owner belongs to that identity there, and what it makes belongs to the owner. The
    mount is nobody else's, and goes with the last descriptor. Raises HostError.
    """
    try:
        if identity is None or identity.uid is None:
            descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            descriptor = await _exchanged(path, identity, readonly=readonly)
    except PermissionError as exc:
        raise NotPermittedError(f"can't share {path}: {exc.strerror}") from exc
    except OSError as exc:
        raise HostError(f"can't share {path}: {exc.strerror}",
                        hint="not every filesystem can be lent; share it over virtio-fs") from exc
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def _exchanged(path: Path, identity: Identity, *, readonly: bool) -> int:
    import ctypes  # takes 5 ms, and few come here

    owner = os.stat(path)
    libc = ctypes.CDLL(None, use_errno=True)
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_RECURSIVE
    tree = _checked(libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags))
    try:
        attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (MOUNT_ATTR_RDONLY if readonly else 0)
        async with _ids(f"{owner.st_uid} {identity.uid} 1", f"{owner.st_gid} {identity.gid} 1") as namespace:
            raw = struct.pack("QQQQ", attributes | MOUNT_ATTR_IDMAP, 0, 0, namespace)
            # Not what is mounted below: not every filesystem can do it, and /proc has no owner.
            _checked(libc.syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, raw, len(raw)))
        raw = struct.pack("QQQQ", attributes, 0, 0, 0)
        _checked(libc.syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH | AT_RECURSIVE, raw, len(raw)))
    except BaseException:
        os.close(tree)
        raise
    return tree


@asynccontextmanager
async def _ids(uids: str, gids: str) -> AsyncIterator[int]:
    """A user namespace with these maps; it is only there to describe them."""
    argv: list[str | Path] = [find_tool("unshare", package="util-linux"), "--user", "sh", "-c", "echo; read -r line"]
    async with spawn(argv, stdin=PIPE, stdout=PIPE, env=TOOL_ENV, kill=KILL) as child:
        assert child.stdout is not None
        try:
            await child.stdout.receive()        # it is in the namespace
        except anyio.EndOfStream:
            raise OSError(errno.EPERM, "no user namespace can be made") from None
        namespace = _described(child.pid, uids, gids)
    try:
        yield namespace
    finally:
        os.close(namespace)


def _described(pid: int, uids: str, gids: str) -> int:
    Path(f"/proc/{pid}/uid_map").write_text(uids)
    Path(f"/proc/{pid}/gid_map").write_text(gids)
    return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def _checked(result: int) -> int:
    import ctypes

    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
