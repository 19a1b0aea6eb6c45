"""Run by virtiofsd's launch as a program of its own, ``python -I -S enter.py PLAN PROGRAM ARGUMENT...``: it imports
nothing of pykata.

It goes into a user and a mount namespace, puts the shared directories and files side by side into a tmpfs, each with
its own read-only flag, and becomes the daemon, which then sees nothing else. A daemon that a guest breaks into has no
capability of the host's; and what is read-only is so by the host's kernel, whatever the guest's thinks.
"""

import ctypes
import json
import os
import resource
import struct
import sys

AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE = 1, 2, 4, 32, 4096, 16384, 1 << 19
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442        # the same on every architecture
PR_SET_PDEATHSIG, SIGKILL = 1, 9
IDS = 65536             # what a container may have

libc = ctypes.CDLL(None, use_errno=True)


class FailedError(Exception):
    pass


def main() -> None:
    plan = json.loads(sys.argv[1])
    parent = os.getppid()
    try:
        raise_limit()
        enter_namespaces()
        check("prctl", libc.prctl(PR_SET_PDEATHSIG, SIGKILL))      # the change of credentials cleared it
        if os.getppid() != parent:
            sys.exit(1)
        build(plan["root"], plan["shares"])
        os.execv(sys.argv[2], sys.argv[2:])
    except (FailedError, OSError) as exc:
        sys.exit(f"{exc}")


def raise_limit() -> None:
    """The daemon holds a descriptor for each file that the guest knows of."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for wanted in (1_000_000, most):
        try:
            return resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, most)))
        except (ValueError, OSError):       # only root may raise it beyond the hard limit
            continue
    return None


def enter_namespaces() -> None:
    uid, gid = os.geteuid(), os.getegid()
    ready, go = os.pipe(), os.pipe()
    if uid == 0 and os.fork() == 0:
        # Root's guests have the ids that they have: as with Docker. Only who stays outside can write such a map.
        os.read(ready[0], 1)
        me = os.getppid()
        for kind in ("uid", "gid"):
            with open(f"/proc/{me}/{kind}_map", "w") as file:
                file.write(f"0 0 {IDS}")
        os.write(go[1], b"x")
        os._exit(0)
    check("unshare", libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    if uid == 0:
        os.write(ready[1], b"x")
        os.close(go[1])
        if os.read(go[0], 1) != b"x":
            raise FailedError("can't map user ids")
        os.wait()
    else:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    for descriptor in (*ready, go[0]):
        os.close(descriptor)
    if uid != 0:
        os.close(go[1])


def build(root: str, shares: list[list[str]]) -> None:
    """Mount all ``shares`` (name, path, "ro" or "rw", "dir" or "file") below ``root``."""
    mount(None, "/", None, MS_REC | MS_SLAVE, None)
    # Opened before the tmpfs hides what may lie below it.
    opened = [(name, clone(path, mode), kind) for name, path, mode, kind in shares]
    mount("pykata", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for name, tree, kind in opened:
        place = os.path.join(root, name)
        if kind == "dir":
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC))
        flags = MOVE_MOUNT_F_EMPTY_PATH
        check("move_mount", libc.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(place), flags))
        os.close(tree)
    mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)


def clone(path: str, mode: str) -> int:
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE
    tree: int = libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags)
    check(path, tree)
    attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (MOUNT_ATTR_RDONLY if mode == "ro" else 0)
    raw = struct.pack("QQQQ", attributes, 0, 0, 0)
    check(path, libc.syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH | AT_RECURSIVE, raw, len(raw)))
    return tree


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(f"mount {target}", libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))


def check(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise FailedError(f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
