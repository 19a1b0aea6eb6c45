"""Run as programs of its own, ``python -I -S gate.py VERB ...``: it imports nothing of pykata.

``judge FD REFUSED...`` is asked by the kernel whenever another process connects a socket or sends something to an
address (seccomp_unotify(2)), and says no to the REFUSED networks of IPv4. What a connected socket sends and receives
isn't asked about, and so costs nothing. The name servers of resolv.conf may be asked wherever they are.

``before FD JUDGE COMMAND...`` becomes COMMAND, judged by the process JUDGE, which has the other end of the socket FD.
``attempt FD JUDGE UID`` becomes nothing, but that user if it may: it tries whether judging works.

It keeps a guest from the host, not a QEMU that the guest has broken into: that could change an address after it was
looked at.
"""

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

MACHINES = {
    # AUDIT_ARCH_... of linux/audit.h, then the numbers of seccomp, connect and sendto.
    "x86_64": (0xC000003E, 317, 42, 44),
    "aarch64": (0xC00000B7, 277, 203, 206),
}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_PTRACER = 1, 4, 38, 0x59616D61
SET_MODE_FILTER, NEW_LISTENER = 1, 8
ALLOW, ASK, FAIL = 0x7FFF0000, 0x7FC00000, 0x00050000 | errno.EPERM
RECEIVE, ANSWER, IS_VALID, CONTINUE = 0xC0502100, 0xC0182101, 0x80082102, 1      # linux/seccomp.h
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06      # of words, with constants: linux/bpf_common.h
NUMBER, ARCHITECTURE, FIFTH = 0, 4, 48              # offsets in struct seccomp_data

RESOLV = "/etc/resolv.conf"
DOMAIN = 53
KNOWN = 4096            # addresses that are remembered
LONGEST = 28            # bytes of an address that are looked at: those of IPv6

libc = ctypes.CDLL(None, use_errno=True)


class Gate:
    """Says where connections may go."""

    def __init__(self, refused: list[str]) -> None:
        import ipaddress  # takes a while, which only this process has

        networks = [ipaddress.IPv4Network(each) for each in refused]
        self._masks = [(int(each.network_address), int(each.netmask)) for each in networks]
        self._known: dict[bytes, bool] = {}

    def refusal(self, raw: bytes) -> int:
        """The error that a socket's address deserves (struct sockaddr), or 0."""
        family = int.from_bytes(raw[:2], sys.byteorder)
        if family in (socket.AF_UNIX, socket.AF_NETLINK):
            return 0
        # UDP takes AF_UNSPEC for IPv4.
        if family not in (socket.AF_INET, socket.AF_UNSPEC) or len(raw) < 8:
            return errno.EACCES
        address = raw[4:8]
        free = self._known.get(address)
        if free is None:
            free = self._find(address)
        if free or (int.from_bytes(raw[2:4], "big") == DOMAIN and socket.inet_ntoa(address) in name_servers()):
            return 0
        return errno.EHOSTUNREACH

    def _find(self, address: bytes) -> bool:
        if len(self._known) >= KNOWN:
            self._known.clear()
        number = int.from_bytes(address, "big")
        free = self._known[address] = not any(number & mask == wanted for wanted, mask in self._masks)
        return free


def name_servers(path: str = RESOLV) -> list[str]:
    """Those of the host (resolv.conf(5)): without any it is the host itself."""
    found = []
    with suppress(OSError), open(path, errors="replace") as file:
        found = [words[1] for words in map(str.split, file) if len(words) > 1 and words[0] == "nameserver"]
    return found or ["127.0.0.1"]


# --- the process that is asked ---


def judge(handed: socket.socket, refused: list[str]) -> None:
    """Answer until there is nobody left who could ask. Who started us waits for our end, and ends us."""
    gate = Gate(refused)
    (listener,) = socket.recv_fds(handed, 1, 1)[1]
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while any(happened & select.POLLIN for _, happened in poll.poll()):
        request = bytearray(80)
        with suppress(FileNotFoundError):       # who asked was killed, or interrupted, and asks again
            fcntl.ioctl(listener, RECEIVE, request, True)
            fcntl.ioctl(listener, ANSWER, answer(gate, listener, request))
    while True:
        signal.pause()


def answer(gate: Gate, listener: int, request: bytearray) -> bytes:
    """To one question: a struct seccomp_notif_resp for a struct seccomp_notif."""
    number, pid, _, call, _, _, *words = struct.unpack("=QIIiIQ6Q", request)
    where, length = words[4:6] if call == MACHINES[os.uname().machine][3] else words[1:3]
    become_owner_of(pid)
    try:
        raw = memory(pid, where, min(length, LONGEST))
    except PermissionError:
        raise
    except (OSError, OverflowError):
        return struct.pack("=QqiI", number, 0, -errno.EFAULT, 0)
    # Was it the memory of who asks? The pid may be somebody else's by now.
    fcntl.ioctl(listener, IS_VALID, struct.pack("=Q", number))
    refused = gate.refusal(raw)
    return struct.pack("=QqiI", number, 0, -refused, 0 if refused else CONTINUE)


def memory(pid: int, where: int, length: int) -> bytes:
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, length, where)
    finally:
        os.close(descriptor)


def become_owner_of(pid: int) -> None:
    """Run as whoever COMMAND has become, who may look into it: root without CAP_SYS_PTRACE may not."""
    owner, parent = os.stat(f"/proc/{pid}"), os.getppid()
    if os.geteuid() == 0 != owner.st_uid:
        os.setgroups([])
        os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
        os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
        end_with(parent)            # the change of credentials cleared it


# --- the process that is judged ---


def hand_over(control: socket.socket, judge: int) -> None:
    """From here on this process, and what it becomes, is asked about."""
    libc.prctl(PR_SET_PTRACER, judge, 0, 0, 0)      # for Yama; without it there is no such call
    listener = installed()
    socket.send_fds(control, [b"."], [listener])
    os.close(listener)
    control.close()


def attempt(uid: int) -> bool:
    """Whether what may be done is done, and what may not is refused: the loopback is, here."""
    if os.geteuid() == 0 != uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        check("prctl", libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0))     # as for a program that was started like that
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        nobody = b"\0" + os.urandom(16)
        return one.connect_ex(nobody) == errno.ECONNREFUSED and other.connect_ex(("127.0.0.1", 9)) == errno.EHOSTUNREACH


def main() -> None:
    verb, control, rest = sys.argv[1], socket.socket(fileno=int(sys.argv[2])), sys.argv[3:]
    if verb == "judge":
        judge(control, rest)
    try:
        hand_over(control, int(rest[0]))
        if verb == "attempt":
            sys.exit(not attempt(int(rest[1])))
        os.execv(rest[1], rest[1:])
    except OSError as exc:
        sys.exit(f"can't run {rest[1]} behind a gate: {exc}")


def installed() -> int:
    """From here on this thread, and what it becomes, is asked about by the descriptor."""
    architecture, seccomp, connect, sendto = MACHINES[os.uname().machine]
    steps = [
        (LOAD, 0, 0, ARCHITECTURE), (JUMP_IF_EQUAL, 1, 0, architecture), (RETURN, 0, 0, FAIL),
        (LOAD, 0, 0, NUMBER), (JUMP_IF_EQUAL, 5, 0, connect), (JUMP_IF_EQUAL, 0, 5, sendto),
        # Without an address: the other end of a connection.
        (LOAD, 0, 0, FIFTH), (JUMP_IF_EQUAL, 0, 2, 0), (LOAD, 0, 0, FIFTH + 4), (JUMP_IF_EQUAL, 1, 0, 0),
        (RETURN, 0, 0, ASK), (RETURN, 0, 0, ALLOW),
    ]  # fmt: skip
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in steps))
    header = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program))
    check("prctl", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    return check("seccomp", libc.syscall(seccomp, SET_MODE_FILTER, NEW_LISTENER, header))


def end_with(parent: int) -> None:
    check("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)


def check(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


if __name__ == "__main__":
    main()
