"""Run by virtiofsd's launch as a program of its own: it imports nothing of pykata, and little else, for a guest waits.

``python -I -S enter.py ROOT SHELF COUNT SHARE... PROGRAM ARGUMENT...``, where each of COUNT shares is four words: name,
path, "ro" or "rw", "dir" or "file".

It goes into a user and a mount namespace, puts the shared directories and files side by side into a tmpfs, each with
its own read-only flag, and becomes the daemon, which then sees nothing else. A daemon that a guest breaks into has no
capability of the host's; and what is read-only is so by the host's kernel, whatever the guest's thinks.

SHELF is "-", or the number of a listening socket: then a process stays there that puts further directories beside
them, for as long as who asked for it keeps the connection. Without a PROGRAM there is only that process, and no daemon.
"""

import ctypes
import os
import resource
import struct
import sys

AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 4
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 32, 4096, 16384
MS_SLAVE, MS_SHARED = 1 << 19, 1 << 20
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442        # the same on every architecture
PR_SET_PDEATHSIG, SIGKILL = 1, 9
IDS, ALL_IDS = 65536, 2**32 - 1     # what a container may have, and what there are

libc = ctypes.CDLL(None, use_errno=True)


class FailedError(Exception):
    pass


def main() -> None:
    root, shelf, shares, program = read(sys.argv[1:])
    parent = os.getppid()
    try:
        raise_limit()
        # What is shelved is read-only, and may be anybody's.
        enter_namespaces(IDS if shelf is None else ALL_IDS)
        check("prctl", libc.prctl(PR_SET_PDEATHSIG, SIGKILL))      # the change of credentials cleared it
        if os.getppid() != parent:
            sys.exit(1)
        inside = build(root, shares, shared=shelf is not None)
        if shelf is not None and keeps_shelf(program):
            Shelf(root, inside, shelf).keep()
        if shelf is not None:
            os.set_inheritable(shelf, False)
        os.execv(program[0], program)
    except (FailedError, OSError) as exc:
        sys.exit(f"{exc}")


def read(words: list[str]) -> tuple[str, int | None, list[list[str]], list[str]]:
    """The root, the shelf's descriptor, the shares, and the program."""
    root, shelf, count, *rest = words
    end = 4 * int(count)
    shares = [rest[at : at + 4] for at in range(0, end, 4)]
    return root, None if shelf == "-" else int(shelf), shares, rest[end:]


def raise_limit() -> None:
    """The daemon holds a descriptor for each file that the guest knows of."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for wanted in (1_000_000, most):
        try:
            return resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, most)))
        except (ValueError, OSError):       # only root may raise it beyond the hard limit
            continue
    return None


def enter_namespaces(ids: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    ready, go = os.pipe(), os.pipe()
    if uid == 0 and os.fork() == 0:
        # Root's guests have the ids that they have: as with Docker. Only who stays outside can write such a map.
        os.close(ready[1])
        if os.read(ready[0], 1) != b"x":        # whom it is for was killed
            os._exit(1)
        me = os.getppid()
        for kind in ("uid", "gid"):
            with open(f"/proc/{me}/{kind}_map", "w") as file:
                file.write(f"0 0 {ids}")
        os.write(go[1], b"x")
        os._exit(0)
    check("no user namespace can be made", libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
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


def keeps_shelf(program: list[str]) -> bool:
    """Whether this is the process that keeps the shelf: a child of the daemon's, which ends with it."""
    if not program:
        return True
    parent = os.getpid()
    if os.fork() != 0:
        return False
    check("prctl", libc.prctl(PR_SET_PDEATHSIG, SIGKILL))
    if os.getppid() != parent:
        sys.exit(1)
    return True


def build(root: str, shares: list[list[str]], *, shared: bool) -> int:
    """Mount all ``shares`` (name, path, "ro" or "rw", "dir" or "file") below ``root``.

    What is mounted there later is seen in the namespace of the daemon, too, if the mount is ``shared``. Returns a
    descriptor of the directory in which something can still be made.
    """
    mount(None, "/", None, MS_REC | MS_SLAVE, None)
    # Opened before the tmpfs hides what may lie below it.
    opened = [(name, clone(path, mode), kind) for name, path, mode, kind in shares]
    mount("pykata", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    inside = clone(root, "rw") if shared else -1
    if shared:
        mount(None, root, None, MS_SHARED, None)
    for name, tree, kind in opened:
        place = os.path.join(root, name)
        if kind == "dir":
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC))
        attach(tree, place)
        os.close(tree)
    mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
    return inside


class Shelf:
    """Directories that come and go: each is mounted as long as a connection lasts over which its path came.

    A directory that comes again has the name that it had: the guest's 9p knows a directory by one name only.
    """

    def __init__(self, root: str, inside: int, listener: int) -> None:
        import socket  # it takes as long as all the rest does, and the daemon has no use for it

        self.root = root
        self.inside = inside
        self.listener = socket.socket(fileno=listener)
        self.names: dict[tuple[int, ...], str] = {}
        self.users: dict[str, int] = {}
        self.connections: dict[int, tuple[socket.socket, str]] = {}
        self.send_fds = socket.send_fds

    def keep(self) -> None:
        import select

        os.chdir("/")
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self.listener.fileno():
                    connection = self.listener.accept()[0]
                    self.connections[connection.fileno()] = connection, ""
                    poll.register(connection, select.POLLIN)
                elif not self.serve(descriptor):
                    poll.unregister(descriptor)
                    self.connections.pop(descriptor)[0].close()

    def serve(self, descriptor: int) -> bool:
        """Do what a connection asks for; False: it has ended."""
        connection, place = self.connections[descriptor]
        try:
            asked = connection.recv(8192)
            if not asked or place:
                self.remove(place)
                return False
            if asked == b"/":
                tree = os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                self.send_fds(connection, [b"+"], [tree])
                os.close(tree)
                return True
            try:
                place = self.add(os.fsdecode(asked))
                self.connections[descriptor] = connection, place
                connection.send(f"+{place}".encode())
            except FailedError as exc:
                connection.send(f"-{exc}".encode())
        except OSError:
            self.remove(place)
            return False
        return True

    def add(self, path: str) -> str:
        # Nothing that is mounted below it: only the directory itself was asked for.
        tree = clone(path, "ro", recursive=False)
        try:
            found = os.stat(tree)
            name = self.names.setdefault((found.st_dev, found.st_ino, found.st_ctime_ns), str(len(self.names) + 1))
            if not self.users.get(name):
                os.mkdir(name, dir_fd=self.inside)
                attach(tree, os.path.join(self.root, name))
        finally:
            os.close(tree)
        self.users[name] = self.users.get(name, 0) + 1
        return name

    def remove(self, name: str) -> None:
        if not name:
            return
        self.users[name] -= 1
        if not self.users[name]:
            libc.umount2(os.fsencode(os.path.join(self.root, name)), MNT_DETACH | UMOUNT_NOFOLLOW)
            os.rmdir(name, dir_fd=self.inside)


def clone(path: str, mode: str, *, recursive: bool = True) -> int:
    below = AT_RECURSIVE if recursive else 0
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | below
    tree: int = libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags)
    check(path, tree)
    attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (MOUNT_ATTR_RDONLY if mode == "ro" else 0)
    raw = struct.pack("QQQQ", attributes, 0, 0, 0)
    check(path, libc.syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH | below, raw, len(raw)))
    return tree


def attach(tree: int, place: str) -> None:
    flags = MOVE_MOUNT_F_EMPTY_PATH
    check("move_mount", libc.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(place), flags))


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(f"mount {target}", libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))


def check(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise FailedError(f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
