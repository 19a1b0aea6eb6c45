"""User-mode networking as somebody sets it up with the programs' own commands, for the floor of a benchmark."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import anyio
from attrs import frozen

from benchmarks._by_hand import EVERYWHERE, MAC, sh
from pykata.host import KILL, TOOL_ENV, find_tool, spawn
from pykata.net import netns
from pykata.net.base import NetworkStrategy, Wanted
from pykata.net.netlink import netlink
from pykata.net.relay import bound
from pykata.net.tap import Tap, open_tap
from pykata.net.user import announce
from pykata.spec import Attachment, Interface, Nic, Port, Route

GUEST, MTU = "10.0.2.15", 65520
INSIDE = """
sysctl -q -w net.ipv4.ip_forward=1
ip addr add 10.0.2.2/24 dev TAP; ip link set TAP mtu 65520 up
ip addr add 10.0.3.1/24 dev up0; ip link set up0 up; ip route add default via 10.0.3.2
"""


def _interface(mtu: int = 0) -> Interface:
    return Interface(MAC, "eth0", mtu=mtu, addresses=(f"{GUEST}/24",), routes=(Route(EVERYWHERE, "10.0.2.2"),))


@frozen
class QemuUser(NetworkStrategy):
    """QEMU's own networking with nothing beside it."""

    name = "QEMU's by hand"
    publishes = True

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        with bound(wanted.ports, listening=False) as kept:
            ports = tuple(each.port for each in kept)
            forwards = [{"str": f"tcp:{each.address}:{each.host}-{GUEST}:{each.guest}"} for each in ports]
            device = Nic("user", MAC, {"type": "user", "hostfwd": forwards})
            yield Attachment(devices=(device,), interfaces=(_interface(),), published=ports)


@frozen
class Slirp4netns(NetworkStrategy):
    """slirp4netns in a namespace, and the guest's tap beside its own; it publishes the ports."""

    name = "slirp4netns by hand"
    publishes = True

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        async with AsyncExitStack() as stack:
            top = stack.enter_context(tempfile.TemporaryDirectory())
            inside = await stack.enter_async_context(netns.made(Path(top, "net")))
            ready, said = os.pipe()
            stack.callback(os.close, ready)
            argv: list[str | Path] = [
                find_tool("slirp4netns", package="slirp4netns"), "--netns-type=path", "--cidr=10.0.3.0/24",
                f"--mtu={MTU}", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp",
                f"--ready-fd={said}", f"--api-socket={top}/api", inside.path, "up0",
            ]  # fmt: skip
            await stack.enter_async_context(spawn(argv, pass_fds=[said], env=TOOL_ENV, kill=KILL))
            os.close(said)
            await anyio.wait_readable(ready)
            fd = open_tap(inside, "TAP")
            await sh(inside, INSIDE)
            async with netlink(inside) as kernel:
                announce(inside, await kernel.link("up0"))
                nic = Tap("TAP", (await kernel.link("TAP")).index, fd, inside).nic(MAC)
            stack.callback(os.close, fd)
            ports = tuple([_forwarded(Path(top, "api"), port) for port in wanted.ports])
            yield Attachment(devices=(nic,), interfaces=(_interface(MTU),), published=ports)


def _free(port: Port) -> Port:
    """The same with a port of the host that nobody has."""
    with socket.create_server((port.address, 0)) as free:
        return Port(port.guest, int(free.getsockname()[1]), port.address)


def _forwarded(api: Path, port: Port) -> Port:
    """Have slirp4netns publish it (slirp4netns(1), API SOCKET)."""
    free = _free(port)
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(api))
        arguments = {"proto": "tcp", "host_addr": free.address, "host_port": free.host, "guest_addr": GUEST,
                     "guest_port": free.guest}
        client.sendall(json.dumps({"execute": "add_hostfwd", "arguments": arguments}).encode())
        client.shutdown(socket.SHUT_WR)
        answer = json.loads(client.recv(1 << 16))
    assert "error" not in answer, answer
    return free


@frozen
class Passt(NetworkStrategy):
    """passt at QEMU's socket, as its manual has it. It publishes the ports."""

    name = "passt by hand"
    publishes = True

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        async with AsyncExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            ports = tuple([_free(port) for port in wanted.ports])
            words = [word for each in ports for word in ("-t", f"{each.address}/{each.host}:{each.guest}")]
            argv: list[str | Path] = [
                find_tool("passt", package="passt", env_var="PYKATA_PASST"), "--foreground", "--quiet", "--ipv4-only",
                "-a", GUEST, "-n", "24", "-g", "10.0.2.2", "--mtu", str(MTU), "--no-dhcp", "--no-map-gw",
                "--fd", str(theirs.fileno()), *words,
            ]  # fmt: skip
            await stack.enter_async_context(spawn(argv, pass_fds=[theirs.fileno()], env=TOOL_ENV, kill=KILL))
            theirs.close()
            device = Nic("passt", MAC, {"type": "socket", "fd": str(ours.fileno())}, fds=(ours.fileno(),))
            yield Attachment(devices=(device,), interfaces=(_interface(MTU),), published=ports)
