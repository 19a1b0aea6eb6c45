"""Run as a program of its own, ``python -I -S uplink.py FD PROGRAM ARGUMENT...``: it imports nothing of pykata.

It makes a user namespace in which it is root, and a network namespace in that. A child stays in there and opens what it
is asked for over the socket FD; it itself becomes the program that connects the network namespace to the host's own.
``@`` in an argument is the directory in /proc of a process that is in there. All of it needs no privileges, and ends
with whoever started it.
"""

import ctypes
import json
import os
import signal
import socket
import struct
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, SIGKILL = 1, 4, 9
CAPABILITY_VERSION = 0x20080522

SETTINGS = {
    "net/ipv4/ip_forward": "1",
    # Who may not go somewhere is told each time, and not once in a second.
    "net/ipv4/icmp_ratelimit": "0",
    "net/ipv6/icmp/ratelimit": "0",
    "net/ipv6/conf/all/forwarding": "1",
    # No address is anybody else's here: no second is spent on finding that out.
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/accept_ra": "0",
}
OPTIONAL = "net/ipv6"       # a kernel may have been told to do without

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    started_by = os.getppid()
    try:
        enter_user_namespace()
        # The change of credentials cleared it.
        end_with(started_by)
        ready, said = os.pipe()
        me = os.getpid()
        child = os.fork()
        if child == 0:
            os.close(ready)
            end_with(me)
            serve(control, said)
        os.close(said)
        control.close()
        shown = os.read(ready, 20).decode()
        if not shown:
            sys.exit(1)         # the child has said why
        os.close(ready)
        command = [each.replace("@", f"/proc/{shown}") for each in sys.argv[2:]]
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)       # Python ignores them, which passt inherits and stumbles over
        os.execv(command[0], command)
    except OSError as exc:
        sys.exit(f"can't make the namespaces: {exc}")


def enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    check("unshare user", libc.unshare(CLONE_NEWUSER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        write(f"/proc/self/{name}", text)


def serve(control: socket.socket, said: int) -> None:
    """Be the network namespace: make it, and open things in it, until nobody can ask any more."""
    try:
        check("unshare network", libc.unshare(CLONE_NEWNET))
        for name, text in SETTINGS.items():
            try:
                write(f"/proc/sys/{name}", text)
            except OSError:
                if not name.startswith(OPTIONAL):
                    raise
        os.write(said, str(show(control)).encode())
        os.close(said)
    except OSError as exc:
        sys.stderr.write(f"can't make the network namespace: {exc}\n")
        sys.stderr.flush()
        os._exit(1)
    while request := control.recv(4096):
        answer(control, json.loads(request))
    os._exit(0)


def show(control: socket.socket) -> int:
    """A process that does nothing and may do nothing: those with few capabilities may look into /proc at it alone."""
    me = os.getpid()
    if (child := os.fork()) != 0:
        return child
    control.close()
    end_with(me)
    header, nothing = struct.pack("II", CAPABILITY_VERSION, 0), bytes(24)
    check("capset", libc.capset(header, nothing))
    # The changes of credentials cleared it.
    check("prctl", libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0))
    while True:
        signal.pause()


def answer(control: socket.socket, request: dict[str, object]) -> None:
    """Open a socket or a device here, and pass it on."""
    try:
        if "socket" in request:
            opened = socket.socket(*request["socket"]).detach()     # type: ignore[misc]
        else:
            opened = os.open(str(request["open"]), int(request["flags"]))       # type: ignore[call-overload]
    except OSError as exc:
        control.send(json.dumps({"errno": exc.errno}).encode())
        return
    try:
        socket.send_fds(control, [b"{}"], [opened])
    finally:
        os.close(opened)


def end_with(parent: int) -> None:
    check("prctl", libc.prctl(PR_SET_PDEATHSIG, SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def check(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
