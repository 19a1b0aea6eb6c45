"""A policy that allows a network, and what of it connects the guest: gateways and their name servers."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path

import anyio
import pytest

from pykata import Bridge, NetworkStrategy, UserNetwork
from pykata.net.base import Wanted
from pykata.net.netns import socket_in
from pykata.net.policy.rules import policy_of
from tests.host.stand_in import stand_in

BRIDGE = Bridge(network="own", subnet="10.88.7.0/24")
QUESTION = b"\0\1\1\0\0\1\0\0\0\0\0\0\4evil\7example\0\0\1\0\1"


@pytest.mark.parametrize(("strategy", "addresses"), [
    # slirp4netns answers questions of DNS at .3, with the host's name servers, and is the host's loopback at .2.
    (UserNetwork("slirp4netns"), ["10.0.3.3", "10.0.3.2", "10.0.3.1", "10.0.2.2"]),
    # A guest's name server is in the upper half, and answers others, too.
    (BRIDGE, ["10.88.7.130", "10.88.7.1", "10.88.7.254"]),
], ids=["user", "bridge"])  # fmt: skip
async def test_they_are_reached_only_if_they_are_named(
    tmp_path: Path, strategy: NetworkStrategy, addresses: list[str]
) -> None:
    directory = tmp_path / "0123456789"
    await anyio.Path(directory).mkdir()
    wanted = Wanted(policy=policy_of(["10.0.0.0/8"], (), None))
    async with strategy.attach(directory, wanted) as attachment, stand_in(attachment) as guest:
        for address in addresses:
            with socket_in(guest, socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.setblocking(False)
                client.connect((address, 53))
                client.send(QUESTION)
                with pytest.raises(OSError, check=lambda exc: exc.errno == errno.EHOSTUNREACH):
                    async with asyncio.timeout(120):
                        await asyncio.get_running_loop().sock_recv(client, 100)
        (guard,) = attachment.guards
        said = {}
        async with asyncio.timeout(120):
            async for event in guard.events():
                if event.protocol == "udp":
                    said[event.address] = event.reason
                if said.keys() == set(addresses):
                    break
        assert said == dict.fromkeys(addresses, "protected")
