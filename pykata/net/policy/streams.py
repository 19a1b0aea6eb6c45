"""What a guest sends in a TCP connection, in order, as the server will read it."""

from __future__ import annotations

from pykata.net.policy.shown import RefusedError

MOST = 64 * 1024        # bytes that the server hasn't acknowledged


class Sent:
    """The bytes from a first sequence number on, as long as the server hasn't acknowledged them.

    A guest that sends other bytes under the same numbers would show us something else than the server: it is refused.
    Sequence numbers are counted from ``start``, modulo 2^32 (RFC 9293, 3.4).
    """

    def __init__(self, start: int) -> None:
        self._start = start
        self._kept = bytearray()
        self.acknowledged = 0       # how much the server has for sure
        self.kept_from = 0          # how much of that isn't kept any more

    @property
    def length(self) -> int:
        """How much was sent."""
        return self.kept_from + len(self._kept)

    @property
    def kept(self) -> bytes:
        """What is kept: all of it, until :meth:`forget`."""
        return bytes(self._kept)

    def take(self, seq: int, data: bytes) -> bytes | None:
        """What is new in a segment, in order; None for one that comes too early, or for which there is no room.

        Raises RefusedError for one that contradicts an earlier one.
        """
        offset = self._offset(seq)
        if offset < self.kept_from:
            data, offset = data[self.kept_from - offset :], self.kept_from
        at = offset - self.kept_from
        if at > len(self._kept) or at + len(data) > MOST:
            return None
        known = self._kept[at : at + len(data)]
        if data[: len(known)] != known:
            raise RefusedError("rewritten", "it sends other bytes again than it sent before")
        new = data[len(known) :]
        self._kept += new
        return new

    def continues(self, seq: int) -> bool:
        """Is it the number of what was sent, of what comes next, or of a probe whether the other end is there?"""
        return -1 <= self._offset(seq) <= self.length + 1       # a FIN has a number, too

    def acknowledge(self, ack: int) -> None:
        """The server has everything before this number."""
        offset = self._offset(ack)
        if self.acknowledged < offset <= self.length + 1:
            self.acknowledged = min(offset, self.length)

    def forget(self) -> None:
        """Drop what the server has acknowledged: nothing that comes later can change it."""
        del self._kept[: self.acknowledged - self.kept_from]
        self.kept_from = self.acknowledged

    def _offset(self, number: int) -> int:
        """The distance from the start, near to where we are: numbers come round after 4 GiB."""
        about = self.acknowledged
        distance = (number - self._start - about) & 0xFFFFFFFF
        return about + (distance - (1 << 32) if distance >= 1 << 31 else distance)
