"""Guests at a real userspace switch: DPDK's testpmd, which passes on between two vhost-user ports."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pykata import Sandbox, ShareLostError, VhostUser
from pykata.guest import Bundle
from pykata.host import PIPE, HostProcess, find_tool, spawn
from tests.vm.conftest import until

BUSYBOX = "builtin:busybox"
SERVE = "mkdir /www && echo over the switch > /www/index.html && httpd -p 80 -h /www"


@asynccontextmanager
async def switch(directory: Path) -> AsyncIterator[HostProcess]:
    """What comes in at its port ``a`` goes out at ``b``, and back. It turns on one core as long as it is there."""
    argv: list[str | Path] = [
        find_tool("stdbuf", package="coreutils"), "-oL", find_tool("dpdk-testpmd", package="dpdk-dev"),
        "--no-huge", "-m", "96", "--no-pci", "--no-telemetry", "--no-shconf", "-l", "0,1",
        f"--vdev=net_vhost0,iface={directory}/a,queues=2", f"--vdev=net_vhost1,iface={directory}/b",
        "--", "--forward-mode=io", "--auto-start", "--total-num-mbufs=2048", "--no-mlockall",
    ]  # fmt: skip
    async with spawn(argv, stdin=PIPE, stdout=PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        said = b""
        while b"Press enter" not in said:
            said += await process.stdout.receive()
        yield process


async def test_two_guests_at_a_switch(bundle: Bundle, tmp_path: Path) -> None:
    one = VhostUser(tmp_path / "a", addresses=["10.3.0.1/24"], queues=2)
    two = VhostUser(tmp_path / "b", addresses=["10.3.0.2/24", "fd03::2/64"], mac="02:00:00:00:00:0b", offload=False)
    async with (
        switch(tmp_path) as process,
        Sandbox(isolation="emulated", network=one) as client,
        Sandbox(isolation="emulated", network=two) as server,
        server.container(BUSYBOX) as box,
    ):
        await box.shell(SERVE, check=True)
        done = await client.shell(BUSYBOX, until("wget -q -O - http://10.3.0.2/"), timeout=600)
        assert done.stdout == "over the switch\n", done.stderr
        assert "02:00:00:00:00:0b" in (await client.run(BUSYBOX, ["ip", "neigh"])).stdout
        assert client.network.addresses == ("10.3.0.1",)
        async with client.process(BUSYBOX, ["sleep", "600"]) as sleeping:
            process.kill()
            with pytest.raises(ShareLostError, match=r"the switch at .*/a closed its connection"):
                await sleeping.wait()
