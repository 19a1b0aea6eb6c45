"""Run as a program of its own, ``python -I -S sieve.py GUEST UPLINK DNS ANSWERS REFUSED...``: it imports nothing of
pykata.

All frames between a guest and QEMU's own user networking go through it: GUEST and UPLINK are sockets on which QEMU
speaks them, each behind its length in four bytes. QEMU makes a connection of everything that it is sent, to the host's
loopback too. So what goes to one of the REFUSED networks ends here, and the guest is told. DNS is an address where only
name servers are reached; with ANSWERS other than 0 the guest may go on with connections that came from where it may
not go: to its published ports.
"""

import select
import socket
import struct
import sys
from contextlib import suppress

CHUNK = 256 * 1024
MOST = 1024 * 1024          # bytes that may wait for one side before the other has to
LARGEST = 65536 + 18        # bytes of a frame
KNOWN = 4096                # destinations that are remembered

ARP, IPV4 = b"\x08\x06", b"\x08\x00"
ICMP, TCP, UDP = 1, 6, 17
SYN, ACK = 0x02, 0x10
DOMAIN = b"\x00\x35"
PROHIBITED = (3, 13)        # destination unreachable, communication administratively prohibited (RFC 1812, 5.2.7.1)


class Sieve:
    """Says which frames of the guest may go on."""

    def __init__(self, dns: str, refused: list[str], *, answers: bool) -> None:
        self._dns = socket.inet_aton(dns)
        self._refused = [network(each) for each in refused]
        self._answers = answers
        self._known: dict[bytes, bool] = {}

    def passes(self, frame: bytes) -> bool:
        """Whether it may. What isn't ARP or whole IPv4 may not: nothing else is spoken there."""
        kind = frame[12:14]
        if kind == ARP:
            return True
        if kind != IPV4 or len(frame) < 34 or not 0x45 <= frame[14] <= 0x4F or frame[23] not in (ICMP, TCP, UDP):
            return False
        destination = frame[30:34]
        free = self._known.get(destination)
        if free is None:
            free = self._find(destination)
        return free or self._passes_anyway(frame, destination)

    def _find(self, destination: bytes) -> bool:
        if len(self._known) >= KNOWN:
            self._known.clear()
        number = int.from_bytes(destination, "big")
        free = not any(number & mask == wanted for wanted, mask in self._refused)
        self._known[destination] = free
        return free

    def _passes_anyway(self, frame: bytes, destination: bytes) -> bool:
        """Questions to the name server, and what belongs to a connection that the guest didn't begin.

        Of a fragment it isn't known what it is. A segment begins a connection if it has SYN without ACK.
        """
        transport = frame[14 + (frame[14] & 15) * 4 :]
        if frame[20] & 0x3F or frame[21] or len(transport) < 8:
            return False
        if destination == self._dns:
            return frame[23] in (TCP, UDP) and transport[2:4] == DOMAIN
        return self._answers and frame[23] == TCP and len(transport) >= 20 and transport[13] & (SYN | ACK) != SYN


def network(text: str) -> tuple[int, int]:
    """An IPv4 network as its address and its mask."""
    address, _, bits = text.partition("/")
    mask = 0xFFFFFFFF << 32 - int(bits or 32) & 0xFFFFFFFF
    return int.from_bytes(socket.inet_aton(address), "big") & mask, mask


def refusal(frame: bytes) -> bytes:
    """The ICMP error that tells the sender of TCP or UDP that it may not (RFC 792); nothing for others."""
    if len(frame) < 42 or frame[12:14] != IPV4 or frame[23] not in (TCP, UDP) or frame[20] & 0x1F or frame[21]:
        return b""
    quoted = frame[14 : 14 + (frame[14] & 15) * 4 + 8]
    message = summed(struct.pack("!BBHI", *PROHIBITED, 0, 0) + quoted, 2)
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(message), 0, 0, 64, ICMP, 0, frame[30:34], frame[26:30])
    return frame[6:12] + frame[:6] + IPV4 + summed(head, 10) + message


def summed(packet: bytes, at: int) -> bytes:
    """With the checksum (RFC 1071) of it all in its place."""
    words = packet + bytes(len(packet) % 2)
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return packet[:at] + struct.pack("!H", ~total & 0xFFFF) + packet[at + 2 :]


class End:
    """One of the two sides: what came from it, up to a frame that isn't whole yet, and what waits for it."""

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.socket.setblocking(False)
        self.waiting = bytearray()
        self._begun = b""

    def frames(self) -> "tuple[bytes, list[tuple[int, int]]]":
        """What is there to be read, and where in it whole frames are, their lengths included."""
        data = self.socket.recv(CHUNK)
        if not data:
            sys.exit(0)         # QEMU has ended
        data = self._begun + data if self._begun else data
        at, found = 0, []
        while len(data) - at >= 4:
            size = int.from_bytes(data[at : at + 4], "big")
            if size > LARGEST:
                sys.exit(f"QEMU announced a frame of {size} bytes")
            if at + 4 + size > len(data):
                break
            found.append((at, at + 4 + size))
            at += 4 + size
        self._begun = data[at:]
        return data, found

    def flush(self) -> None:
        """Give it what it takes."""
        if self.waiting:
            with suppress(BlockingIOError):
                del self.waiting[: self.socket.send(self.waiting)]


def from_guest(guest: End, uplink: End, sieve: Sieve) -> None:
    data, frames = guest.frames()
    for begin, end in frames:
        frame = data[begin + 4 : end]
        if sieve.passes(frame):
            uplink.waiting += data[begin:end]
        elif len(guest.waiting) < MOST and (told := refusal(frame)):
            guest.waiting += len(told).to_bytes(4, "big") + told


def to_guest(guest: End, uplink: End) -> None:
    data, frames = uplink.frames()
    if frames:
        guest.waiting += data[: frames[-1][1]]


def main() -> None:
    guest, uplink = (End(int(each)) for each in sys.argv[1:3])
    sieve = Sieve(sys.argv[3], sys.argv[5:], answers=sys.argv[4] != "0")
    poll = select.poll()
    while True:
        for end, other in ((guest, uplink), (uplink, guest)):
            reading = select.POLLIN if len(other.waiting) < MOST else 0
            poll.register(end.socket, reading | (select.POLLOUT if end.waiting else 0))
        for descriptor, happened in poll.poll():
            if happened & ~select.POLLOUT:
                if descriptor == guest.socket.fileno():
                    from_guest(guest, uplink, sieve)
                else:
                    to_guest(guest, uplink)
        guest.flush()
        uplink.flush()


if __name__ == "__main__":
    with suppress(ConnectionError):     # QEMU was killed
        main()
