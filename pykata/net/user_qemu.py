"""User-mode networking by QEMU itself, where nothing else works: no program, namespace, device or right is needed.

QEMU makes a connection of whatever the guest sends, also to the loopback and the other addresses of the host, which its
options can't forbid. So a process of ours is asked by the kernel where QEMU may connect to (:mod:`.gate`). Where that
can't be, the guest's device isn't connected to QEMU's network, but by two sockets to a process in between
(:mod:`.sieve`), without which no frame gets there.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import anyio

from pykata import host
from pykata.errors import NotPermittedError
from pykata.net.base import Wanted
from pykata.net.relay import bound
from pykata.spec import Attachment, Interface, Nic, Port, Route

SIEVE, GATE = (Path(__file__).with_name(name) for name in ("sieve.py", "gate.py"))
NETWORK, GATEWAY, DNS, GUEST = "10.0.2.0/24", "10.0.2.2", "10.0.2.3", "10.0.2.15"
UNPRIVILEGED = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
PATIENCE = 20.0        # seconds for the attempt, on the busiest host

NOWHERE = ("0.0.0.0/8", "127.0.0.0/8", NETWORK, "224.0.0.0/3")
"""Addresses of this host, by other names, and those of groups, to which it may belong."""


def lacking(wanted: Wanted, *, ipv6: bool) -> str:
    """What of this QEMU can't do, or nothing."""
    if wanted.policy is not None:
        return "enforce allow, deny or rate"
    if ipv6:
        return "pass IPv6 on"
    if any(each.protocol != "tcp" or ":" in each.address for each in wanted.ports):
        return "publish ports of UDP, or on IPv6"
    return ""


@asynccontextmanager
async def by_qemu(wanted: Wanted, mac: str, refused: Sequence[str], *, to_host: bool) -> AsyncIterator[Attachment]:
    """QEMU's own network, without what is ``refused`` and this host, unless ``to_host``. Raises HostError."""
    async with AsyncExitStack() as stack:
        # They stay bound, and so ours: QEMU can listen there beside them, for all have SO_REUSEADDR.
        ports = tuple(each.port for each in stack.enter_context(bound(wanted.ports, listening=False)))
        _check_allowed(ports)
        forwards = [{"str": f"tcp:{each.address}:{each.host}-{GUEST}:{each.guest}"} for each in ports]
        slirp = {"type": "user", "net": NETWORK, "host": GATEWAY, "dns": DNS, "ipv6": False, "hostfwd": forwards}
        kept = (*NOWHERE, *(each for each in refused if ":" not in each))
        if to_host:
            device = Attachment(devices=(Nic("user", mac, slirp),))
        elif await gate_works():
            through, fd, words = await stack.enter_async_context(_gate("before", kept))
            device = Attachment(devices=(Nic("user", mac, slirp, fds=(fd,), through=through),), lost=(words.ended,))
        else:
            guest, uplink, words = await stack.enter_async_context(_sieve(kept, answers=bool(ports)))
            device = Attachment(devices=(_behind(mac, guest, uplink, slirp),), lost=(words.ended,))
        yield device + Attachment(
            nameservers=(DNS,), published=ports, via=("qemu",),
            interfaces=(Interface(mac, "eth0", addresses=(f"{GUEST}/24",), routes=(Route("0.0.0.0/0", GATEWAY),)),),
            hosts=(("host.internal", GATEWAY),) if to_host else (),
        )  # fmt: skip


async def gate_works() -> bool:
    """Whether processes may be judged here, which is tried once: not beside who judges them already (some containers),
    where processes may not be looked into (Yama), nor by a Linux before 5.5.
    """
    if _worked is None:
        return await _try_gate()
    return _worked


_worked: bool | None = None     # in this process, once it was tried


async def _try_gate() -> bool:
    global _worked
    async with AsyncExitStack() as stack:
        argv, fd, _ = await stack.enter_async_context(_gate("attempt", ("127.0.0.0/8",)))
        identity = stack.enter_context(host.ephemeral_identity())
        uid = str(identity.uid or 0) if identity else "0"
        attempt = host.spawn([*argv, uid], pass_fds=[fd], cwd=Path("/"), env=host.TOOL_ENV, kill=host.KILL)
        process = await stack.enter_async_context(attempt)
        worked = False
        with anyio.move_on_after(PATIENCE):
            _worked = worked = await process.wait() == 0      # one that takes too long may have been on a busy host
    return worked


@asynccontextmanager
async def _gate(verb: str, refused: Sequence[str]) -> AsyncIterator[tuple[tuple[str, ...], int, host.LastWords]]:
    """A process that judges; the command through which what is to be judged is started, with its descriptor."""
    async with AsyncExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(ours)
        with theirs:
            argv: list[str | Path] = [sys.executable, "-I", "-S", GATE, "judge", str(theirs.fileno()), *refused]
            process = await stack.enter_async_context(host.spawn(
                argv, stderr=host.PIPE, pass_fds=[theirs.fileno()], cwd=Path("/"), env=host.TOOL_ENV, kill=host.KILL,
            ))  # fmt: skip
        words = host.LastWords(process, "the process that judges QEMU's connections")
        stack.push_async_callback(words.stop)
        through = (sys.executable, "-I", "-S", str(GATE), verb, str(ours.fileno()), str(process.pid))
        yield through, ours.fileno(), words


def _behind(mac: str, guest: int, uplink: int, slirp: dict[str, object]) -> Nic:
    """The device is at one socket, and QEMU's network with the other at a hub."""
    return Nic("user", mac, {"type": "socket", "fd": str(guest)}, fds=(guest, uplink), beside=(
        {**slirp, "id": "slirp"},
        {"type": "hubport", "id": "slirp-port", "hubid": 0, "netdev": "slirp"},
        {"type": "socket", "id": "sieved", "fd": str(uplink)},
        {"type": "hubport", "id": "sieved-port", "hubid": 0, "netdev": "sieved"},
    ))  # fmt: skip


@asynccontextmanager
async def _sieve(refused: Sequence[str], *, answers: bool) -> AsyncIterator[tuple[int, int, host.LastWords]]:
    """The process in between, and the two sockets for QEMU."""
    async with AsyncExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(2)]
        for ours, _ in pairs:
            stack.enter_context(closing(ours))
        theirs = [pair[1] for pair in pairs]
        try:
            given = tuple(each.fileno() for each in theirs)
            options = (*map(str, given), DNS, str(int(answers)), *refused)
            argv: list[str | Path] = [sys.executable, "-I", "-S", SIEVE, *options]
            process = await stack.enter_async_context(host.spawn(
                argv, stderr=host.PIPE, pass_fds=given, cwd=Path("/"), env=host.TOOL_ENV, kill=host.KILL,
            ))  # fmt: skip
        finally:
            for each in theirs:
                each.close()
        words = host.LastWords(process, "the process before QEMU's network")
        stack.push_async_callback(words.stop)
        yield pairs[0][0].fileno(), pairs[1][0].fileno(), words


def _check_allowed(ports: Sequence[Port]) -> None:
    """QEMU, which has to listen, is nobody even where we are root."""
    least = int(UNPRIVILEGED.read_text()) if ports and os.geteuid() == 0 else 0
    for each in ports:
        if each.host < least:
            raise NotPermittedError(f"port {each.address}:{each.host}/tcp may not be used: QEMU has no privileges",
                                    hint=f"choose one above {least - 1}, or another network than QEMU's")
