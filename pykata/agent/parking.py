"""Connections to an agent that was saved together with its machine, and goes on in another one.

The agent's serial port has no connections of its own: what goes on in the new machine is the byte stream of the old.
The agent finds the beginning of a new connection by HTTP/2's preface (guest/agent/src/transport/preface.rs). So one
that is *parked* before the machine is saved, by the first bytes of a preface, leaves an agent that has greeted its next
host already and waits; nothing of the old connection is left to be done in the new machine. One that isn't parked,
because processes run that need it, is left as it was, and the next host has to find the agent's greeting behind
whatever was still under way.
"""

from __future__ import annotations

import asyncio

from pykata.agent.guard import ACK, HEADER_SIZE, LONGEST, SETTINGS
from pykata.errors import AgentProtocolError

MARK = b"PRI"
"""The beginning of a preface. Where a frame begins it can't be anything else, as its length would be 5 MB."""

MOST_LEFT = 16 * 1024 * 1024
"""Bytes of the old connection that may come before the new one's; what fits into the port's queues is less."""


AHEAD = b"PRI * PYKATA/1\r\n\r\nCALL\r\n"
"""Begins a call that comes before the preface of its connection: in a cold guest each step on its way is a slow one."""

CLONE, RUN = 0, 1               # which call it is


def ahead(kind: int, request: bytes) -> bytes:
    """The first calls of a connection, to be sent before anything of HTTP/2: see agent.proto."""
    return b"".join((AHEAD, bytes((kind,)), len(request).to_bytes(3), request))


class Greeting:
    """Reads along for the agent's first frame, its settings; ``expected`` is what they are known to be.

    With ``expected``, whatever comes before them belongs to another connection and is dropped.
    """

    def __init__(self, expected: bytes = b"") -> None:
        self.frame = b""
        self._expected = expected
        self._read = bytearray()
        self._dropped = 0

    def __call__(self, data: bytes) -> bytes:
        """What of these bytes is for the connection."""
        if self.frame:
            return data
        self._read += data
        if self._expected:
            return self._seek()
        if len(self._read) >= HEADER_SIZE:
            size = HEADER_SIZE + int.from_bytes(self._read[:3])
            if len(self._read) >= size or size > HEADER_SIZE + LONGEST[SETTINGS]:
                self.frame = bytes(self._read[: HEADER_SIZE + LONGEST[SETTINGS]][:size])
        return data

    def _seek(self) -> bytes:
        at = self._read.find(self._expected)
        if at < 0:
            spare = max(0, len(self._read) - len(self._expected) + 1)
            self._dropped += spare
            del self._read[:spare]
            if self._dropped > MOST_LEFT:
                raise AgentProtocolError(f"the agent sent {self._dropped} bytes without greeting its new host")
            return b""
        self.frame = self._expected
        return bytes(self._read[at:])


class Parking:
    """Reads what the agent sends after it was told that a new connection begins; ``done`` when it has greeted that."""

    def __init__(self, begun: bytes = b"", left: int = 0) -> None:
        """The last frame before may have come in part: ``begun`` of its header, or all but ``left`` bytes of it."""
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._read = bytearray(begun)
        self._left = left

    def __call__(self, data: bytes) -> bytes:
        self._read += data[self._left :]
        self._left = max(0, self._left - len(data))
        while len(self._read) >= HEADER_SIZE and not self.done.done():
            size = HEADER_SIZE + int.from_bytes(self._read[:3])
            kind, flags = self._read[3], self._read[4]
            if size - HEADER_SIZE > LONGEST.get(kind, -1):
                raise AgentProtocolError("the agent sent what isn't HTTP/2 while its connection was parked")
            if len(self._read) < size:
                break
            if kind == SETTINGS and not flags & ACK:
                self.done.set_result(bytes(self._read[:size]))
            del self._read[:size]
        return b""
