"""A policy at a tap, with a namespace in the guest's place: what is allowed works."""

from __future__ import annotations

import pytest

from tests.netlab import GOOD, GOOD6, client_hello, lab


@pytest.mark.parametrize("bridge", [False, True], ids=["uplink", "bridge"])
async def test_an_allowed_name_is_found_and_reached(bridge: bool) -> None:
    async with lab(["good.example"], bridge=bridge) as world:
        assert await world.addresses("good.example") == [GOOD]
        assert await world.talk(GOOD, 443, client_hello()) == b"reply"
        assert await world.talk(GOOD, 80, b"GET / HTTP/1.1\r\nHost: good.example\r\n\r\n") == b"reply"
        event = await world.event(action="allowed", port=443)
        assert (event.name, event.address, event.protocol) == ("good.example", GOOD, "tcp")


async def test_ipv6() -> None:
    async with lab(["good.example"]) as world:
        assert await world.addresses("good.example", "AAAA") == [GOOD6]
        assert await world.talk(GOOD6, 443, client_hello()) == b"reply"
