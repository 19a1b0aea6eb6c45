"""Finds what a test left behind: on this machine, and of this test run only.

A :func:`snapshot` before and one after; :func:`left` says what is in the second and wasn't in the first. Processes that
were orphaned count, because the test process makes itself their reaper (:func:`adopt_orphans`).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from attrs import frozen

Things = Mapping[str, str]
"""What there is of a kind: an identity that isn't used twice, and how to tell a reader what it is."""

SETTLE = 60.0
"""Seconds that something killed or told to stop may take to be gone on a busy machine; nothing else is given any."""

FOR_GOOD = {".uids", ".lock", ".networks", ".slots"}
"""In the run and state directories for good: what matters of them is who holds a lock. Removing it would break that."""

PR_SET_CHILD_SUBREAPER = 36


@frozen
class Places:
    """Directories that only this test run uses."""

    run: Path
    cache: Path
    tmp: Path
    state: Path

    @property
    def all(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.run, self.cache, self.tmp, self.state)


Snapshot = Mapping[str, Things]


def snapshot(places: Places) -> Snapshot:
    """What there is now, by kind."""
    return {kind: look(places) for kind, look in KINDS.items()}


def left(before: Snapshot, places: Places) -> list[str]:
    """What there is now and wasn't before, each as a line. Waits for what is on its way out."""
    deadline = time.monotonic() + SETTLE
    while True:
        found = difference(before, snapshot(places))
        unsettled = any(line.startswith(SETTLING) for line in found)
        if not unsettled or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def difference(before: Snapshot, after: Snapshot) -> list[str]:
    """What is in ``after`` only, each as a line that begins with its kind."""
    return [
        f"{kind}: {described}"
        for kind, things in after.items()
        for key, described in things.items()
        if key not in before[kind]
    ]


def adopt_orphans() -> None:
    """Make this process the parent of its orphaned descendants, so that they can be found (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


# --- processes and threads ---


def processes(places: Places) -> Things:
    """Descendants of this process that live. A zombie is dead: who should reap it may be slow.

    Unless only its first thread is: the others have what it has open, still.
    """
    parents = {pid: stat for pid in _numbers("/proc") if (stat := _stat(pid))}
    ours = {os.getpid()}
    found: dict[str, str] = {}
    # A child may have a lower number than its parent: look until nothing is added.
    while new := {pid for pid, (_, parent, _) in parents.items() if parent in ours and pid not in ours}:
        ours |= new
        living = [pid for pid in new if not _is_dead(pid, parents[pid][0])]
        found |= {f"{pid}/{parents[pid][2]}": f"{pid} {_command(pid)}" for pid in living}
    return found


def _is_dead(pid: int, state: str) -> bool:
    try:
        return state in "ZX" and len(_numbers(f"/proc/{pid}/task")) <= 1
    except OSError:
        return True


def _stat(pid: int) -> tuple[str, int, str] | None:
    try:
        # proc_pid_stat(5): the name (2) may hold anything; then state, ppid, ..., starttime is field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), fields[19]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    except OSError:
        return ""


def threads(places: Places) -> Things:
    """Threads of this process. anyio and the loop's default executor keep idle workers for the next call."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    return {
        str(tid): f"{tid} {names.get(tid, '(not made by Python)')}"
        for tid in _numbers("/proc/self/task")
        if not names.get(tid, "").startswith(("AnyIO worker", "asyncio_"))
    }


def other_tasks(known: Iterable[asyncio.Task[object]]) -> list[str]:
    """The unfinished tasks of the running loop that aren't among ``known``, each as a line."""
    current = asyncio.current_task()
    return [
        f"task: {task.get_name()} {task.get_coro()}"
        for task in asyncio.all_tasks()
        if task is not current and task not in set(known)
    ]


# --- descriptors and sockets ---


def descriptors(places: Places) -> Things:
    """Open files of this process, by number and target."""
    found = {}
    for fd in _numbers("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue            # the one that lists the directory
        found[f"{fd} {target}"] = f"{fd} -> {target}{_socket_name(target)}"
    return found


def _socket_name(target: str) -> str:
    inode = target.removeprefix("socket:[").removesuffix("]")
    for line in _lines("/proc/net/unix") if target.startswith("socket:[") else ():
        fields = line.split(maxsplit=7)
        if fields[6] == inode:
            return f" (unix {fields[7] if len(fields) > 7 else 'unnamed'})"
    return ""


def sockets(places: Places) -> Things:
    """Unix sockets bound below our directories, whoever holds them."""
    bound = (line.split(maxsplit=7) for line in _lines("/proc/net/unix")[1:])
    return {fields[6]: fields[7] for fields in bound if len(fields) > 7 and _below(fields[7], places.all)}


# --- files ---


def files(places: Places) -> Things:
    """What is in the run and temporary directories, and unfinished in the cache."""
    entries = [
        *_entries(places.run), *_entries(places.tmp), *_unfinished(places.cache), *_entries(places.state / "sandboxes"),
    ]  # fmt: skip
    return {str(path): str(path) for path in entries if path.name not in FOR_GOOD}


def _entries(folder: Path) -> Iterator[Path]:
    yield from folder.iterdir() if folder.is_dir() else ()


def _unfinished(cache: Path) -> Iterator[Path]:
    # Finished entries may stay, that is what a cache is for; what is being made is hidden or has "tmp" in its name.
    for where, folders, names in os.walk(cache):
        yield from (Path(where, name) for name in (*folders, *names) if name.startswith(".") or "tmp" in name)


# --- the kernel's ---


def mounts(places: Places) -> Things:
    """Mounts on or of something below our directories (proc_pid_mountinfo(5))."""
    found = {}
    for line in _lines("/proc/self/mountinfo"):
        fields = line.split()
        source = fields[fields.index("-") + 2]
        if _alone("mnt") or _below(fields[4], places.all) or _below(source, places.all):
            found[fields[0]] = f"{source} on {fields[4]}"
    return found


def loops(places: Places) -> Things:
    """Loop devices with a backing file below our directories."""
    found = {}
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        backing = "".join(_lines(str(file)))
        if _below(backing, places.all):
            device = file.parent.parent.name
            found[f"{device} {backing}"] = f"{device} of {backing}"
    return found


def interfaces(places: Places) -> Things:
    """Network interfaces; all of them where nobody else makes any, else those with a name like ours."""
    return {f"{n} {name}": name for n, name in socket.if_nameindex() if _alone("net") or _is_ours(name, places)}


def _is_ours(name: str, places: Places) -> bool:
    # One that says whose it is may be another test run's.
    alias = "".join(_lines(f"/sys/class/net/{name}/ifalias"))
    return name.startswith(("pk", "pykata")) and (not alias or _below(alias, places.all))


def tables(places: Places) -> Things:
    """Tables of nftables: those with a name like ours, and all where nobody else makes any."""
    found = netlink_dump(NETLINK_NETFILTER, GET_TABLE, 4)
    names = [(_text(attributes.get(1, b"")), header[0]) for header, attributes in found]
    mine = [(name, family) for name, family in names if name.startswith("pykata") or _alone("net")]
    return {f"{family} {name}": f"{name} of family {family}" for name, family in mine if name not in IPTABLES}


def disciplines(places: Places) -> Things:
    """Queueing disciplines for what comes in, of our interfaces; of all where nobody else makes any."""
    ours = {n for n, name in socket.if_nameindex() if _alone("net") or _is_ours(name, places)}
    found = netlink_dump(NETLINK_ROUTE, GET_QDISC, 20)
    kinds = [(int.from_bytes(header[4:8], "little"), _text(attributes.get(1, b""))) for header, attributes in found]
    return {
        f"{index} {kind}": f"{kind} of interface {index}"
        for index, kind in kinds if kind in ("ingress", "clsact") and index in ours
    }  # fmt: skip


IPTABLES = ("raw", "mangle", "nat", "filter", "security")
"""What iptables makes when it is called for the first time, and leaves."""

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
GET_QDISC, GET_TABLE = 38, 10 << 8 | 1      # rtnetlink(7); NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
DUMP, DONE, FAILED = 0x301, 3, 2            # NLM_F_REQUEST | NLM_F_DUMP; netlink(7)


def netlink_dump(protocol: int, kind: int, header: int) -> list[tuple[bytes, dict[int, bytes]]]:
    """What the kernel lists: the ``header`` of each message, of so many bytes, and its attributes."""
    found: list[tuple[bytes, dict[int, bytes]]] = []
    try:
        kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    except OSError:     # a kernel without it has none
        return found
    with kernel:
        kernel.send(struct.pack("=IHHII", 16 + header, kind, DUMP, 1, 0) + bytes(header))
        while True:
            rest = kernel.recv(1 << 16)
            while rest:
                length, message = struct.unpack_from("=IH", rest)
                if message in (DONE, FAILED):
                    return found
                found.append((rest[16:16 + header], _attributes(rest[16 + header:length])))
                rest = rest[length + 3 & ~3:]


def _attributes(raw: bytes) -> dict[int, bytes]:
    found = {}
    while len(raw) >= 4:
        length, kind = struct.unpack_from("=HH", raw)
        found[kind & 0x3FFF] = raw[4:length]
        raw = raw[max(length, 4) + 3 & ~3:]
    return found


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


def _alone(kind: str) -> bool:
    # In a namespace of our own whatever is made is ours. Elsewhere a neighbour's mount or interface isn't our leak.
    try:
        return os.readlink(f"/proc/self/ns/{kind}") != os.readlink(f"/proc/1/ns/{kind}")
    except OSError:
        return False


def _below(path: str, folders: Iterable[Path]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _numbers(folder: str) -> list[int]:
    return [int(name) for name in os.listdir(folder) if name.isdigit()]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


KINDS: Mapping[str, Callable[[Places], Things]] = {
    "process": processes,
    "thread": threads,
    "descriptor": descriptors,
    "socket": sockets,
    "file": files,
    "mount": mounts,
    "loop device": loops,
    "interface": interfaces,
    "nftables table": tables,
    "queueing discipline": disciplines,
}
SETTLING = ("process", "thread")
