"""A CNI configuration as container engines have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pykata.net import netns
from pykata.net.netlink import netlink

BRIDGE = "pkcni0"


def chain(tmp_path: Path, version: str = "1.0.0", *, six: bool = False) -> dict[str, Any]:
    """What container engines have: a bridge, published ports, and a firewall."""
    ranges = [[{"subnet": "10.66.0.0/24"}], *([[{"subnet": "fd66::/64"}]] if six else [])]
    routes = [{"dst": "0.0.0.0/0"}, *([{"dst": "::/0"}] if six else [])]
    return {
        "cniVersion": version, "name": "lab", "plugins": [
            {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipMasq": True, "mtu": 1400,
             "dns": {"nameservers": ["10.66.0.1"], "search": ["lab.test"]},
             "ipam": {"type": "host-local", "dataDir": str(tmp_path / "ipam"), "ranges": ranges, "routes": routes}},
            {"type": "portmap", "capabilities": {"portMappings": True}},
            {"type": "firewall"},
        ],
    }  # fmt: skip


async def without_bridge() -> None:
    """Remove the bridge, which the plugin leaves for the next container."""
    with netns.opened() as host:
        async with netlink(host) as kernel:
            await kernel.delete_named(BRIDGE)
