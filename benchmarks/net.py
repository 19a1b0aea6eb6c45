"""Throughput (iperf3, one TCP connection for a second) and round trips (ping) of a guest, for each kind of network.

The floor is a guest of the same machine and network device whose host's side was set up by hand, with the commands of
iproute2, in the same run: both machines run at the same time and are measured in turn. It takes root.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from attrs import field, frozen

import pykata
from benchmarks._table import Row, interleaved, main, row
from pykata.host import DEVNULL, PIPE, find_tool, run_tool, spawn
from pykata.net import netns
from pykata.net.base import NetworkStrategy, Wanted
from pykata.net.chardev import open_macvtap
from pykata.net.netlink import netlink
from pykata.net.netns import Netns
from pykata.net.tap import Tap, open_tap
from pykata.spec import Attachment, Interface

IMAGE = "bench-iperf3:latest"
MAC, ADDRESS, SERVER = "02:00:00:00:00:02", "10.1.0.2/24", "10.1.0.1"
KINDS = ("tcfilter", "macvtap", "bridge")

# The server is in a namespace of its own, at the other end of a wire or of the bridge.
PLUGGED = {
    "tcfilter": f"ip addr add {ADDRESS} dev near; ip link set near address {MAC}",
    "macvtap": f"ip addr add {ADDRESS} dev near; ip link set near address {MAC}",
    "bridge": "ip link add br0 type bridge; ip link set near master br0; ip link set br0 up",
}
FILTER = "protocol all u32 match u32 0 0 action mirred egress redirect dev"
BY_HAND = {
    "tcfilter": f"tc qdisc add dev near ingress; tc filter add dev near parent ffff: {FILTER} TAP; "
                f"tc qdisc add dev TAP ingress; tc filter add dev TAP parent ffff: {FILTER} near",
    "macvtap": "ip addr flush dev near; ip link set near address 02:00:00:00:00:03; "
               f"ip link add link near name TAP address {MAC} type macvtap mode bridge",
    "bridge": "ip link set TAP master br0",
}  # fmt: skip


async def measure(rounds: int, kinds: Sequence[str] = KINDS) -> list[Row]:
    """Four rows for each kind."""
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
    recipe = pykata.Recipe().with_files({**files, "/bin/iperf3": programs[0], "/bin/busybox": programs[1]}, mode=0o755)
    recipe = recipe.with_files({"/tmp/.keep": b""})     # where iperf3 has what it sends
    await pykata.build_image(recipe, IMAGE)


async def _compared(kind: str, rounds: int) -> list[Row]:
    async with AsyncExitStack() as stack:
        ends = [await stack.enter_async_context(end_of(kind, by_hand=by_hand)) for by_hand in (False, True)]
        ours, floor = ends
        found = await interleaved(
            rounds, ours.out, floor.out, ours.into, floor.into, ours.round_trip, floor.round_trip
        )
    out, out_floor, into, into_floor, ping, ping_floor = found
    return [
        row(f"{kind}: guest to host", "Mbit/s", out, out_floor),
        row(f"{kind}: host to guest", "Mbit/s", into, into_floor),
        row(f"{kind}: round trip", "us", ping, ping_floor),
        row(f"{kind}: CPU of the machine for 100 MB", "ms", ours.cpu, floor.cpu),
    ]


@frozen
class End:
    """A guest, and the namespace in which its server is."""

    box: pykata.Container
    server: Netns
    pid: int                            # of QEMU
    cpu: list[float] = field(factory=list)
    """Milliseconds for 100 MB, each time that it sent or received. Other work of this machine hardly changes it."""

    async def out(self) -> float:
        """Mbit/s that the guest sends."""
        return await self._throughput()

    async def into(self) -> float:
        """Mbit/s that it receives."""
        return await self._throughput("-R")

    async def _throughput(self, *direction: str) -> float:
        argv = [*_enter(self.server), str(find_tool("iperf3", package="iperf3")), "-s", "-1", "--forceflush"]
        async with spawn(argv, stdout=PIPE, stderr=DEVNULL, pass_fds=[self.server.fd]) as server:
            assert server.stdout is not None
            said = b""
            while b"listening" not in said:
                said += await server.stdout.receive()
            before = _cpu_seconds(self.pid)
            done = await self.box.run(["iperf3", "-J", "-t", "1", "-c", SERVER, *direction], check=True, timeout=60)
            spent = _cpu_seconds(self.pid) - before
        received = json.loads(done.stdout)["end"]["sum_received"]
        self.cpu.append(spent * 1e3 / (received["bytes"] / 1e8))
        return float(received["bits_per_second"]) / 1e6

    async def round_trip(self) -> float:
        """Of 20, the mean in microseconds."""
        done = await self.box.run(["busybox", "ping", "-c", "20", "-i", "0.02", SERVER], check=True, timeout=60)
        return float(done.stdout.rpartition("= ")[2].split("/")[1]) * 1000


@asynccontextmanager
async def end_of(kind: str, *, by_hand: bool) -> AsyncIterator[End]:
    """A guest on a network of this kind, and a server beside it."""
    with tempfile.TemporaryDirectory() as top:
        async with netns.made(Path(top, "net")) as inside, netns.made() as server:
            await _sh(inside, "ip link add near type veth peer name far; ip link set near up; ip link set lo up")
            async with netlink(inside) as kernel:
                await kernel.change((await kernel.link("far")).index, net_ns_fd=server.fd)
            await _sh(server, f"ip addr add {SERVER}/24 dev far; ip link set far up")
            await _sh(inside, PLUGGED[kind])
            network = ByHand(kind, inside.path) if by_hand else _ours(kind, inside.path)
            async with (
                pykata.Sandbox(network=network, isolation="emulated") as sandbox,
                sandbox.container(IMAGE) as box,
            ):
                yield End(box, server, sandbox._open.vm.pid)


def _cpu_seconds(pid: int) -> float:
    # proc_pid_stat(5): utime and stime, of all threads.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ours(kind: str, path: str) -> NetworkStrategy:
    if kind == "tcfilter":
        return pykata.TCFilter(path)
    return pykata.MacVTap(path) if kind == "macvtap" else pykata.Bridge("br0", netns=path, addresses=[ADDRESS])


@frozen
class ByHand(NetworkStrategy):
    """The same device of QEMU, on a tap that commands have put in its place."""

    name = "by hand"

    kind: str
    netns: str

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        with netns.opened(self.netns) as inside:
            fd = -1 if self.kind == "macvtap" else open_tap(inside, "TAP")
            await _sh(inside, BY_HAND[self.kind])
            await _sh(inside, "ip link set TAP up")
            async with netlink(inside) as kernel:
                index = (await kernel.link("TAP")).index
            made = Tap("TAP", index, open_macvtap(inside, "TAP", index) if fd < 0 else fd, inside)
            yield Attachment(devices=(made.nic(MAC),), interfaces=(Interface(MAC, "eth0", addresses=(ADDRESS,)),))


async def _sh(inside: Netns, script: str) -> None:
    await run_tool([*_enter(inside), "sh", "-ec", script], pass_fds=[inside.fd])


def _enter(inside: Netns) -> list[str]:
    return [str(find_tool("nsenter", package="util-linux")), f"--net=/proc/self/fd/{inside.fd}"]


if __name__ == "__main__":
    main(measure, rounds=5, about=__doc__, kinds=KINDS)
