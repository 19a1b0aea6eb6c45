"""Events of a policy: never too many, and who misses some is told."""

from __future__ import annotations

from pykata.net.policy.events import REMEMBERED, Events, Key


def key(port: int) -> Key:
    return Key("denied", "address", "it isn't allowed", "tcp", "20.0.0.1", port, "")


async def test_a_reader_who_is_too_slow_is_told_how_many_are_lost() -> None:
    events = Events()
    events.tell(key(1))
    reader = aiter(events.read())
    assert (await anext(reader)).port == 1
    for port in range(2, REMEMBERED + 9):
        events.tell(key(port))
    lost = await anext(reader)
    assert (lost.reason, lost.count, lost.action) == ("flood", 7, "denied")
    assert [(await anext(reader)).port for _ in range(3)] == [9, 10, 11]
    events.close()
    assert [event.reason for event in [event async for event in reader]] == ["address"] * (REMEMBERED - 3)
