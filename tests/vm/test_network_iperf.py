"""iperf3 between a guest and a server, both ways, as the benchmark has it."""

from __future__ import annotations

import pytest

from benchmarks.net import end_of, make_image


@pytest.mark.parametrize("kind", ["tcfilter", "macvtap", "bridge"])
async def test_data_passes_both_ways(kind: str) -> None:
    await make_image()
    async with end_of(kind, by_hand=False) as end:
        assert await end.out() > 0
        assert await end.into() > 0
        assert await end.round_trip() > 0
        assert await end.ping() > 0
