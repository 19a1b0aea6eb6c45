"""Throughput (iperf3, one TCP connection) and round trips of a guest, for each kind of network.

The floor is a guest of the same machine and network device whose host's side was set up by hand, with the commands of
iproute2, in the same run: both machines run at the same time and are measured in turn. For ``cni`` that is what its
plugin makes, for ``user`` slirp4netns run by hand, which publishes the port, too; for ``qemu`` (QEMU's own user
networking) that with nothing beside it, and for ``passt`` passt at QEMU's socket, where it isn't too old
($PYKATA_PASTA, $PYKATA_PASST). Round trips are those of ping, and for the kinds of user networking, which leave it to
the host whether its users may ping, of a byte over TCP. It takes root, and belongs into a network namespace of its own:
``unshare -n``.
"""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from attrs import field, frozen

import pykata
from benchmarks._by_hand import MAC, ByHand, enter, sh
from benchmarks._by_hand_user import Passt, QemuUser, Slirp4netns
from benchmarks._table import Row, interleaved, main, row
from pykata.host import DEVNULL, PIPE, find_tool, run_tool, spawn
from pykata.net import netns
from pykata.net.base import NetworkStrategy
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, socket_in

IMAGE = "bench-iperf3:latest"
AMOUNT = 128            # MiB in a connection
USER: Mapping[str, tuple[NetworkStrategy, NetworkStrategy]] = {
    "user": (pykata.UserNetwork(via="slirp4netns"), Slirp4netns()),
    "qemu": (pykata.UserNetwork(via="qemu"), QemuUser()),
    "passt": (pykata.UserNetwork(via="passt"), Passt()),
}
"""Ours and by hand."""
KINDS = ("tcfilter", "macvtap", "bridge", "cni", *USER)
USUAL = KINDS[:-1]      # passt is too old on Debian 12
PORT = 5201             # of iperf3 in the guest
ECHO, TRIPS = 5000, 200


async def measure(rounds: int, kinds: Sequence[str] = USUAL) -> list[Row]:
    """The rows of each kind."""
    await make_image()
    rows = []
    for kind in kinds:
        rows += await _compared(kind, rounds)
    return rows


async def make_image() -> None:
    """One with nothing but iperf3, ping, and what they need: those of this machine."""
    programs = [find_tool("iperf3", package="iperf3"), find_tool("busybox", package="busybox-static")]
    needed = (await run_tool(["ldd", programs[0]])).decode().split()
    libraries = [Path(word) for word in needed if word.startswith("/")]
    files = {str(each): each.resolve() for each in libraries}
    files |= {"/bin/iperf3": programs[0], "/bin/busybox": programs[1], "/bin/cat": programs[1]}
    recipe = pykata.Recipe().with_files(files, mode=0o755)
    recipe = recipe.with_files({"/tmp/.keep": b""})     # where iperf3 has what it sends
    await pykata.build_image(recipe, IMAGE)


async def _compared(kind: str, rounds: int) -> list[Row]:
    async with AsyncExitStack() as stack:
        ours, floor = [await stack.enter_async_context(end_of(kind, by_hand=by_hand)) for by_hand in (False, True)]
        out, out_floor, into, into_floor = await interleaved(rounds, ours.out, floor.out, ours.into, floor.into)
        rows = [
            row(f"{kind}: guest to host", "Mbit/s", out, out_floor),
            row(f"{kind}: host to guest", "Mbit/s", into, into_floor),
            row(f"{kind}: CPU of the machine for 100 MB", "ms", ours.cpu, floor.cpu),
        ]
        if kind in USER:
            port, port_floor = await interleaved(rounds, ours.by_port, floor.by_port)
            rows.append(row(f"{kind}: in by a port", "Mbit/s", port, port_floor))
            trip, trip_floor = await interleaved(rounds, ours.round_trip, floor.round_trip)
        else:
            trip, trip_floor = await interleaved(rounds, ours.ping, floor.ping)
        rows.append(row(f"{kind}: round trip", "us", trip, trip_floor))
    return rows


@frozen
class End:
    """A guest, and the namespace in which its server is."""

    box: pykata.Container
    server: Netns
    address: str                        # the server's
    pid: int                            # of QEMU
    ports: tuple[pykata.Port, ...] = ()
    cpu: list[float] = field(factory=list)
    """Milliseconds for 100 MB, each time that it sent or received. Other work of this machine hardly changes it."""

    async def out(self) -> float:
        """Mbit/s that the guest sends."""
        return await self._throughput()

    async def into(self) -> float:
        """Mbit/s that it receives."""
        return await self._throughput("-R")

    async def _throughput(self, *direction: str) -> float:
        argv = [*enter(self.server), str(find_tool("iperf3", package="iperf3")), "-s", "-1", "--forceflush"]
        async with spawn(argv, stdout=PIPE, stderr=DEVNULL, pass_fds=[self.server.fd]) as server:
            assert server.stdout is not None
            said = b""
            while b"listening" not in said:
                said += await server.stdout.receive()
            before = _cpu_seconds(self.pid)
            argv = ["iperf3", "-J", "-n", f"{AMOUNT}M", "-c", self.address, *direction]
            done = await self.box.run(argv, check=True, timeout=60)
            spent = _cpu_seconds(self.pid) - before
        received = json.loads(done.stdout)["end"]["sum_received"]
        self.cpu.append(spent * 1e3 / (received["bytes"] / 1e8))
        return float(received["bits_per_second"]) / 1e6

    async def by_port(self) -> float:
        """Mbit/s that the host sends to a published port."""
        (port,) = self.ports
        argv = ["iperf3", "-s", "-1", "--forceflush", "-p", str(PORT)]
        async with self.box.process(argv) as server:
            async for line in server.stdout.lines():
                if b"listening" in line:
                    break
            argv = [str(find_tool("iperf3", package="iperf3")), "-J", "-n", f"{AMOUNT}M", "-c", port.address,
                    "-p", str(port.host)]
            done = json.loads(await run_tool(argv, timeout=60))
            await server.wait()
        return float(done["end"]["sum_received"]["bits_per_second"]) / 1e6

    async def round_trip(self) -> float:
        """Of a byte to a process in the guest and back, over TCP, the mean in microseconds."""
        loop = asyncio.get_running_loop()
        with socket_in(self.server, socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind((self.address, ECHO))
            listener.listen()
            async with self.box.process(["busybox", "nc", self.address, str(ECHO), "-e", "/bin/cat"]) as echo:
                connection, _ = await loop.sock_accept(listener)
                with connection:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    connection.settimeout(20)       # it blocks: nothing else is to be done meanwhile
                    spent = await asyncio.to_thread(_trips, connection)
                await echo.wait()
        return spent * 1e6 / TRIPS

    async def ping(self) -> float:
        """Of 20, the mean in microseconds."""
        done = await self.box.run(["busybox", "ping", "-c", "20", "-i", "0.02", self.address], check=True, timeout=60)
        return float(done.stdout.rpartition("= ")[2].split("/")[1]) * 1000


def _trips(connection: socket.socket) -> float:
    for _ in range(TRIPS // 10):        # those that warm up
        connection.send(b".")
        connection.recv(1)
    begun = time.perf_counter()
    for _ in range(TRIPS):
        connection.send(b".")
        connection.recv(1)
    return time.perf_counter() - begun


@asynccontextmanager
async def end_of(kind: str, *, by_hand: bool) -> AsyncIterator[End]:
    """A guest on a network of this kind, and a server beside it, in a namespace of its own."""
    made = _outside if kind == "cni" or kind in USER else _inside
    async with (
        netns.made() as server,
        made(kind, server, by_hand=by_hand) as (strategy, address),
        pykata.Sandbox(network=pykata.Network(strategy, ports=[PORT] if kind in USER else []),
                       isolation="emulated") as sandbox,
        sandbox.container(IMAGE) as box,
    ):  # fmt: skip
        yield End(box, server, address, sandbox._open.vm.pid, sandbox.network.ports)


@asynccontextmanager
async def _inside(kind: str, server: Netns, *, by_hand: bool) -> AsyncIterator[tuple[NetworkStrategy, str]]:
    """A namespace with a wire to the server, or a bridge with one, in which the guest's network is."""
    address = "10.1.0.2/24"
    with tempfile.TemporaryDirectory() as top:
        async with netns.made(Path(top, "net")) as inside:
            await _wired(inside, "near", server, "10.1.0.1/24")
            if kind == "bridge":
                await sh(inside, "ip link add br0 type bridge; ip link set near master br0; ip link set br0 up")
            else:
                await sh(inside, f"ip addr add {address} dev near; ip link set near address {MAC}")
            if by_hand:
                yield ByHand(kind, inside.path, address), "10.1.0.1"
            elif kind == "bridge":
                yield pykata.Bridge("br0", netns=inside.path, addresses=[address]), "10.1.0.1"
            else:
                yield (pykata.TCFilter if kind == "tcfilter" else pykata.MacVTap)(inside.path), "10.1.0.1"


@asynccontextmanager
async def _outside(kind: str, server: Netns, *, by_hand: bool) -> AsyncIterator[tuple[NetworkStrategy, str]]:
    """A wire from where we are to the server; for CNI a bridge with it, and what the plugin makes."""
    number = int(by_hand)
    near, bridge, subnet = f"pkwire{number}", f"pkbench{number}", f"10.1.{number}"
    async with AsyncExitStack() as stack:
        here = stack.enter_context(netns.opened())
        await _wired(here, near, server, f"{subnet}.1/24")
        stack.push_async_callback(sh, here, f"ip link del {near}")      # the next kind has one of this name
        if kind != "cni":
            await sh(here, f"ip addr add {subnet}.2/24 dev {near}")
            yield USER[kind][by_hand], f"{subnet}.1"
            return
        await sh(here, f"ip link add {bridge} type bridge; ip link set {near} master {bridge}; ip link set {bridge} up")
        stack.push_async_callback(sh, here, f"ip link del {bridge}")
        top = stack.enter_context(tempfile.TemporaryDirectory())
        if not by_hand:
            ipam = {"type": "host-local", "dataDir": top, "subnet": f"{subnet}.0/24", "rangeStart": f"{subnet}.2"}
            plugin = {"type": "bridge", "bridge": bridge, "ipam": ipam}
            yield pykata.CNI({"cniVersion": "1.0.0", "name": bridge, "plugins": [plugin]}), f"{subnet}.1"
            return
        inside = await stack.enter_async_context(netns.made(Path(top, "net")))
        await _wired(here, "pkport", inside, f"{subnet}.2/24", far="near")
        await sh(here, f"ip link set pkport master {bridge}")
        await sh(inside, f"ip link set near address {MAC}")
        yield ByHand(kind, inside.path, f"{subnet}.2/24"), f"{subnet}.1"


async def _wired(here: Netns, near: str, there: Netns, address: str, *, far: str = "far") -> None:
    await sh(here, f"ip link add {near} type veth peer name {far}; ip link set {near} up")
    async with netlink(here) as kernel:
        await kernel.change((await kernel.link(far)).index, net_ns_fd=there.fd)
    await sh(there, f"ip addr add {address} dev {far}; ip link set {far} up")


def _cpu_seconds(pid: int) -> float:
    """Of all its threads: sched-stats.rst, of which the first number is nanoseconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((each / "schedstat").read_text().split()[0]) for each in tasks) / 1e9


if __name__ == "__main__":
    main(measure, rounds=11, about=__doc__, kinds=KINDS, usual=USUAL)
