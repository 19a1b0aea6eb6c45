"""What a policy did, for whoever wants to know: bounded, and repeats counted rather than told one by one."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from typing import Literal, NamedTuple

from attrs import asdict, define, field

from pykata.spec import NetworkEvent

REMEMBERED = 1000       # events, for each who reads and for who begins to read late
TOGETHER = 1.0          # seconds within which the same thing is told once more at most, with how often it happened
MOST_KEYS = 512


class Key(NamedTuple):
    """What makes two events the same."""

    action: Literal["allowed", "denied"]
    reason: str
    why: str
    protocol: str
    address: str
    port: int
    name: str


LOST = Key("denied", "flood", "events that came faster than they were read, and are lost", "", "", 0, "")


@define(eq=False)
class _Reader:
    events: deque[NetworkEvent]
    woken: asyncio.Event = field(factory=asyncio.Event)
    lost: int = 0


class Events:
    """Collects and hands out events. Close it, so that its readers end."""

    def __init__(self) -> None:
        self._past: deque[NetworkEvent] = deque(maxlen=REMEMBERED)
        self._readers: set[_Reader] = set()
        self._held: OrderedDict[Key, int] = OrderedDict()
        """How often what was told lately has happened since."""
        self._flush: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def remembered(self) -> int:
        """How many events a new reader gets at once."""
        return len(self._past)

    def tell(self, key: Key) -> None:
        """Something happened."""
        if self._closed:
            return
        if key in self._held:
            self._held[key] += 1
            return
        self._emit(key, 1)
        self._hold(key)

    def _hold(self, key: Key) -> None:
        self._held[key] = 0
        if len(self._held) > MOST_KEYS:
            oldest, count = self._held.popitem(last=False)
            self._emit(oldest, count)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(TOGETHER, self._flush_held)

    def _flush_held(self) -> None:
        self._flush = None
        held, self._held = self._held, OrderedDict()
        for key, count in held.items():
            if count:
                self._emit(key, count)
                self._hold(key)

    def _emit(self, key: Key, count: int) -> None:
        if not count:
            return
        event = NetworkEvent(time=time.time(), count=count, **key._asdict())
        self._past.append(event)
        for reader in self._readers:
            reader.lost += len(reader.events) == REMEMBERED
            reader.events.append(event)
            reader.woken.set()

    async def read(self) -> AsyncIterator[NetworkEvent]:
        """What is remembered, then what comes, until it is closed. Who is too slow is told how many are lost."""
        reader = _Reader(deque(self._past, maxlen=REMEMBERED))
        self._readers.add(reader)
        try:
            while True:
                while reader.events:
                    if reader.lost:
                        count, reader.lost = reader.lost, 0
                        yield NetworkEvent(time=time.time(), count=count, **LOST._asdict())
                    yield reader.events.popleft()
                if self._closed:
                    return
                reader.woken.clear()
                await reader.woken.wait()
        finally:
            self._readers.discard(reader)

    def close(self) -> None:
        """Tell what was held back; readers end with it."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush_held()
        if self._flush is not None:
            self._flush.cancel()
        self._closed = True
        for reader in self._readers:
            reader.woken.set()


def line(event: NetworkEvent) -> str:
    """The event as a line of JSON."""
    return json.dumps(asdict(event), ensure_ascii=True) + "\n"
