"""Networks as somebody makes them with the commands of iproute2, for the floor of a benchmark."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from attrs import frozen

from pykata.host import find_tool, run_tool
from pykata.net import netns
from pykata.net.base import NetworkStrategy, Wanted
from pykata.net.chardev import open_macvtap
from pykata.net.netlink import netlink
from pykata.net.netns import Netns
from pykata.net.tap import Tap, open_tap
from pykata.spec import Attachment, Interface

MAC = "02:00:00:00:00:02"

FILTER = "protocol all u32 match u32 0 0 action mirred egress redirect dev"
REDIRECTED = (
    f"tc qdisc add dev near ingress; tc filter add dev near parent ffff: {FILTER} TAP; "
    f"tc qdisc add dev TAP ingress; tc filter add dev TAP parent ffff: {FILTER} near"
)
COMMANDS = {
    "tcfilter": REDIRECTED,
    "macvtap": "ip addr flush dev near; ip link set near address 02:00:00:00:00:03; "
               f"ip link add link near name TAP address {MAC} type macvtap mode bridge",
    "bridge": "ip link set TAP master br0",
    "cni": REDIRECTED,
}  # fmt: skip

EVERYWHERE = "0.0.0.0/0"


@frozen
class ByHand(NetworkStrategy):
    """The same device of QEMU, on a tap that commands have put in its place."""

    name = "by hand"

    kind: str
    netns: str
    address: str

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        with netns.opened(self.netns) as inside:
            fd = -1 if self.kind == "macvtap" else open_tap(inside, "TAP")
            await sh(inside, COMMANDS[self.kind])
            await sh(inside, "ip link set TAP up")
            async with netlink(inside) as kernel:
                index = (await kernel.link("TAP")).index
            made = Tap("TAP", index, open_macvtap(inside, "TAP", index) if fd < 0 else fd, inside)
            yield Attachment(devices=(made.nic(MAC),), interfaces=(Interface(MAC, "eth0", addresses=(self.address,)),))


async def sh(inside: Netns, script: str) -> None:
    """Run a script there."""
    await run_tool([*enter(inside), "sh", "-ec", script], pass_fds=[inside.fd])


def enter(inside: Netns) -> list[str]:
    """The words before a command that is to run there, with its descriptor."""
    return [str(find_tool("nsenter", package="util-linux")), f"--net=/proc/self/fd/{inside.fd}"]
