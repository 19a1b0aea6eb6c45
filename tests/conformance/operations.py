"""Run in a guest, with the directories to try as arguments: prints what works in each of them, as JSON."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable

CHECKS: dict[str, Callable[[], object]] = {}


def check(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def add(function: Callable[[], object]) -> Callable[[], object]:
        CHECKS[name] = function
        return function

    return add


def write(name: str, data: bytes = b"data") -> str:
    with open(name, "wb") as file:
        file.write(data)
    return name


def read(name: str) -> bytes:
    with open(name, "rb") as file:
        return file.read()


@check("create, read, append, remove")
def basics() -> object:
    write("f")
    with open("f", "ab") as file:
        file.write(b"more")
    assert read("f") == b"datamore"
    os.unlink("f")
    return not os.path.exists("f")


@check("a file removed while it is open")
def removed_while_open() -> object:
    with open(write("f"), "r+b") as file:
        os.unlink("f")
        file.write(b"DATA")
        file.seek(0)
        return file.read() == b"DATA" and os.fstat(file.fileno()).st_nlink == 0


@check("rename over an open file")
def rename_over_open() -> object:
    write("old", b"old")
    with open("old", "rb") as file:
        os.rename(write("new", b"new"), "old")
        return file.read() == b"old" and read("old") == b"new"


@check("hard links")
def hard_links() -> object:
    os.link(write("a"), "b")
    return os.stat("b").st_nlink == 2 and os.path.samefile("a", "b")


@check("symbolic links")
def symbolic_links() -> object:
    os.symlink("nowhere/at all", "link")
    return os.readlink("link") == "nowhere/at all"


@check("FIFOs")
def fifos() -> object:
    os.mkfifo("fifo")
    return stat.S_ISFIFO(os.stat("fifo").st_mode)


@check("UNIX sockets")
def sockets() -> object:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("sock")
        server.listen()
        client.connect("sock")
        return stat.S_ISSOCK(os.stat("sock").st_mode)


@check("device nodes that open (must not)")
def device_nodes() -> object:
    os.mknod("null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with open("null", "wb"):
        return True


@check("modes, setuid among them")
def modes() -> object:
    os.chmod(write("f"), 0o4751)  # noqa: S103
    return stat.S_IMODE(os.stat("f").st_mode) == 0o4751


@check("owners")
def owners() -> object:
    os.chown(write("f"), 1000, 1000)
    found = os.stat("f")
    return (found.st_uid, found.st_gid) == (1000, 1000)


@check("files of other users")
def other_users() -> object:
    os.chmod(".", 0o777)  # noqa: S103
    subprocess.run(["touch", "mine"], user=1000, group=1000, check=True, stderr=subprocess.DEVNULL)
    return os.stat("mine").st_uid == 1000


@check("times to the nanosecond")
def times() -> object:
    os.utime(write("f"), ns=(1_234_567_890_123_456_789, 1_234_567_890_123_456_789))
    return os.stat("f").st_mtime_ns == 1_234_567_890_123_456_789


@check("extended attributes (user.*)")
def attributes() -> object:
    os.setxattr(write("f"), "user.test", b"value")
    return os.getxattr("f", "user.test") == b"value" and os.listxattr("f") == ["user.test"]


@check("O_TMPFILE")
def tmpfile() -> object:
    os.close(os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600))
    return True


@check("O_DIRECT")
def direct() -> object:
    descriptor = os.open(write("f", bytes(8192)), os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as page:
        return os.readv(descriptor, [page]) == 4096


@check("shared memory maps")
def maps() -> object:
    with open(write("f", bytes(4096)), "r+b") as file, mmap.mmap(file.fileno(), 4096) as page:
        page[0:5] = b"hello"
        page.flush()
    return read("f")[:5] == b"hello"


def _taken(take: Callable[[object], None]) -> bool:
    """Is what we have locked locked for another process?"""
    child = os.fork()
    if child == 0:
        try:
            take(open("lock", "r+b"))  # noqa: SIM115 - it ends with the process
        except BlockingIOError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@check("flock")
def flock() -> object:
    with open(write("lock"), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return _taken(lambda other: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB))  # type: ignore[arg-type]


@check("fcntl locks")
def fcntl_locks() -> object:
    with open(write("lock"), "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        return _taken(lambda other: fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB))  # type: ignore[arg-type]


@check("sparse files")
def sparse() -> object:
    with open("f", "wb") as file:
        file.seek(64 * 1024 * 1024)
        file.write(b"end")
    found = os.stat("f")
    return found.st_size == 64 * 1024 * 1024 + 3 and found.st_blocks * 512 < 1024 * 1024


@check("files of 5 GB")
def large() -> object:
    with open("f", "w+b") as file:
        file.seek(5 * 1024**3)
        file.write(b"end")
        file.seek(5 * 1024**3)
        return file.read() == b"end"


@check("fallocate")
def fallocate() -> object:
    with open("f", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 65536)
        # glibc does without the filesystem, if it must; punching a hole it can't.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(file.fileno(), 0, ctypes.c_long(0), ctypes.c_long(131072)):
            raise OSError(ctypes.get_errno(), "fallocate")
    return os.stat("f").st_size == 131072


@check("names of 255 bytes")
def long_names() -> object:
    write("n" * 255)
    try:
        write("n" * 256)
    except OSError as exc:
        return exc.errno == errno.ENAMETOOLONG and "n" * 255 in os.listdir(".")
    return False


@check("names that aren't UTF-8")
def strange_names() -> object:
    with open(b"\xff\xfe\n", "wb"):
        return b"\xff\xfe\n" in os.listdir(b".")


@check("2,000 files in a directory")
def many() -> object:
    os.mkdir("many")
    for number in range(2000):
        os.close(os.open(f"many/{number}", os.O_CREAT | os.O_WRONLY))
    return sorted(map(int, os.listdir("many"))) == list(range(2000))


@check("directories renamed, with what is in them")
def directories() -> object:
    os.makedirs("a/b/c")
    write("a/b/c/f")
    os.rename("a/b", "b")
    return read("b/c/f") == b"data" and os.listdir("a") == []


@check("inotify, of the guest's own changes")
def inotify() -> object:
    libc = ctypes.CDLL(None)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    libc.inotify_add_watch(descriptor, b".", 0x100)     # IN_CREATE
    write("f")
    return b"f\0" in os.read(descriptor, 4096)


@check("programs that run from it")
def programs() -> object:
    write("true", read("/bin/true"))
    os.chmod("true", 0o755)  # noqa: S103
    return subprocess.run(["./true"], check=False).returncode == 0


@check("fsync, of directories too")
def fsync() -> object:
    for name, flags in ((write("f"), os.O_RDWR), (".", os.O_RDONLY)):
        descriptor = os.open(name, flags)
        os.fsync(descriptor)
        os.close(descriptor)
    return True


def attempt(function: Callable[[], object]) -> str:
    signal.alarm(300)
    try:
        return "yes" if function() else "no"
    except OSError as exc:
        return f"no: {errno.errorcode.get(exc.errno or 0, '?')}"
    except subprocess.CalledProcessError:
        return "no"
    finally:
        signal.alarm(0)


def main() -> None:
    results: dict[str, dict[str, str]] = {name: {} for name in CHECKS}
    for place in sys.argv[1:]:
        for number, (name, function) in enumerate(CHECKS.items()):
            here = f"{place}/check{number}"
            os.mkdir(here)
            os.chdir(here)
            results[name][place] = attempt(function)
    print(json.dumps(results))


main()
