"""Attempts to get out past a policy by packets that no kernel sends. The guest is root, and sends what it wants."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pykata.net.netns import socket_in
from tests import frames
from tests.attempts import POLICY, reached_nothing
from tests.frames import ACK, FIN, PSH, RST, SYN, TCP, UDP, URG, ethernet, ip4, ip6
from tests.lies import IPV6, SPOOFED, frame
from tests.netlab import ETH_P_ALL, GOOD, GOOD6, GUEST, GUEST6, MAC, Lab, client_hello, lab, record

OTHER6 = "2a00:1450::2"


@pytest.fixture
async def world() -> AsyncIterator[Lab]:
    async with lab(POLICY) as found:
        yield found


def segment(seq: int, ack: int = 0, payload: bytes = b"", *, ttl: int = 64, dport: int = 443, **options: Any) -> bytes:
    """A frame of the connection from port 7777."""
    made = frames.tcp(GUEST, GOOD, 7777, dport, seq=seq, ack=ack, payload=payload, **{"flags": PSH | ACK, **options})
    return frame(ip4(GUEST, GOOD, TCP, made, ttl=ttl))


async def answer(seen: socket.socket, flags: int) -> tuple[int, int]:
    """The numbers of the next segment to port 7777 with just these flags: its own, and what it acknowledges."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(120):
        while True:
            found = await loop.sock_recv(seen, 65536)
            if found[12:14] == b"\x08\0" and found[23] == TCP and found[36:38] == struct.pack("!H", 7777) \
                    and found[47] == flags:
                return int.from_bytes(found[38:42]), int.from_bytes(found[42:46])


@contextmanager
def listening(world: Lab) -> Iterator[socket.socket]:
    """All that comes to the guest."""
    with world.raw(everything=True) as seen:
        seen.setblocking(False)
        yield seen


async def raw_connection(world: Lab, *, isn: int = 1000) -> tuple[int, int]:
    """A connection of which the guest makes each segment; its next sequence numbers, ours and the server's."""
    await world.addresses("good.example")
    with listening(world) as seen:
        seen.send(segment(isn, flags=SYN))
        theirs, ours = await answer(seen, SYN | ACK)
        assert ours == isn + 1
        return ours, theirs + 1


async def send(world: Lab, payload: bytes, *, seq: int, ack: int, **options: Any) -> None:
    world.send_frame(segment(seq, ack, payload, **options))


@asynccontextmanager
async def eavesdropping(world: Lab) -> AsyncIterator[Callable[[], list[bytes]]]:
    """All frames that come to where everybody else is."""
    with socket_in(world.world.netns, socket.AF_PACKET, socket.SOCK_RAW) as found:
        found.setblocking(False)
        found.bind(("world", ETH_P_ALL))

        def heard() -> list[bytes]:
            frames = []
            with suppress(BlockingIOError):
                while True:
                    frames.append(found.recv(65536))
            return frames

        yield heard


@asynccontextmanager
async def deaf_guest(world: Lab) -> AsyncIterator[None]:
    """The guest's kernel doesn't take part in TCP: it would reset connections that it didn't make."""
    from pykata.host import find_tool, run_tool

    rules = "table ip deaf { chain out { type filter hook output priority 0; tcp flags rst drop; }; }"
    nsenter: list[str | Path] = [find_tool("nsenter", package="util-linux"), f"--net={world.guest.proc_path}"]
    await run_tool([*nsenter, find_tool("nft", package="nftables"), rules])
    yield


async def test_other_bytes_under_the_same_numbers(world: Lab) -> None:
    # The server won't take the first one, as its acknowledgement is of what was never sent.
    async with deaf_guest(world):
        seq, ack = await raw_connection(world)
        await send(world, client_hello(), seq=seq, ack=ack + 1_000_000)
        await send(world, client_hello("evil.example"), seq=seq, ack=ack)
        assert (await world.event(action="denied", address=GOOD, port=443)).reason == "rewritten"
    assert b"evil" not in b"".join(world.world.received.get((GOOD, 443), []))


async def test_bytes_that_die_on_their_way(world: Lab) -> None:
    async with deaf_guest(world):
        seq, ack = await raw_connection(world)
        await send(world, client_hello(), seq=seq, ack=ack, ttl=1)
        await send(world, client_hello("evil.example"), seq=seq, ack=ack)
        reasons = {event.reason for event in await world.events()} | {
            (await world.event(action="denied", address=GOOD, port=443)).reason
        }
    assert "rewritten" in reasons
    assert b"evil" not in b"".join(world.world.received.get((GOOD, 443), []))


async def test_a_wrong_checksum(world: Lab) -> None:
    async with deaf_guest(world):
        seq, ack = await raw_connection(world)
        right = frames.tcp(GUEST, GOOD, 7777, 443, flags=PSH | ACK, seq=seq, ack=ack, payload=client_hello())
        wrong = bytearray(right)
        wrong[16] ^= 1
        world.send_frame(frame(ip4(GUEST, GOOD, TCP, bytes(wrong))))
        assert (await world.event(action="denied", address=GOOD)).reason == "malformed"


async def test_urgent_data(world: Lab) -> None:
    async with deaf_guest(world):
        seq, ack = await raw_connection(world)
        await send(world, client_hello(), seq=seq, ack=ack, flags=PSH | ACK | URG, urgent=3)
        assert (await world.event(action="denied", address=GOOD)).reason == "urgent"


async def test_the_ports_and_numbers_of_an_old_connection(world: Lab) -> None:
    async with deaf_guest(world):
        for _ in range(2):      # the second time, the first number of the SYN is known already
            seq, ack = await raw_connection(world)
            with listening(world) as seen:
                for flight in (client_hello(), record(23, bytes(40))):
                    seen.send(segment(seq, ack, flight))
                    await answer(seen, PSH | ACK)
                    seq, ack = seq + len(flight), ack + 5
                seen.send(segment(seq, ack, flags=RST | ACK))
        seq, ack = await raw_connection(world)
        await send(world, client_hello("evil.example"), seq=seq, ack=ack)
        assert (await world.event(action="denied", address=GOOD)).reason == "mismatch"
    assert b"evil" not in b"".join(world.world.received[GOOD, 443])


async def test_numbers_that_the_server_has_not_accepted(world: Lab) -> None:
    """A server goes on with the numbers that it has, and would take the end of what is sent for the beginning."""
    async with deaf_guest(world):
        seq, ack = await raw_connection(world)
        await send(world, b"", seq=seq, ack=ack, flags=ACK)
        with listening(world) as seen:
            seen.send(segment(seq - 501, flags=SYN))
            assert (await answer(seen, ACK))[1] == seq      # not a new connection
        data = record(22, client_hello()[5:]) + record(23, client_hello("evil.example"))
        await send(world, data, seq=seq - 500, ack=ack)
        await reached_nothing(world)


async def test_an_acknowledgement_ahead_of_what_was_sent(world: Lab) -> None:
    """Where the server remembers nothing of a SYN (cookies), such a number would be the first one for it."""
    async with deaf_guest(world), eavesdropping(world) as heard:
        seq, ack = await raw_connection(world)
        for ahead in (2, 500, -2):
            await send(world, b"", seq=seq + ahead, ack=ack, flags=ACK)
        await send(world, b"", seq=seq, ack=ack, flags=ACK)
        await reached_nothing(world)
        passed = [int.from_bytes(each[38:42]) for each in heard() if each[34:36] == struct.pack("!H", 7777)]
    assert passed == [seq - 1, seq]


@pytest.mark.parametrize("flags", [SYN | FIN, SYN | URG, SYN | RST, SYN | FIN | PSH])
async def test_a_syn_that_is_something_else_too(world: Lab, flags: int) -> None:
    await world.addresses("good.example")
    world.send_frame(segment(1, flags=flags))
    assert (await world.event(action="denied", address=GOOD)).reason == "malformed"
    await reached_nothing(world)


async def test_data_in_a_syn_that_comes_again(world: Lab) -> None:
    # The first one dies on its way; with Fast Open the server would take the data of the second.
    await world.addresses("good.example")
    world.send_frame(segment(1000, flags=SYN, ttl=1))
    fast_open = b"\x22\x0a" + bytes(8) + b"\1\1"
    world.send_frame(segment(1000, flags=SYN, payload=client_hello("evil.example"), options=fast_open))
    assert (await world.event(action="denied", address=GOOD)).reason == "early"
    await reached_nothing(world)


async def test_what_would_number_the_bytes_anew(world: Lab) -> None:
    await world.addresses("good.example")
    async with deaf_guest(world), eavesdropping(world) as heard:
        with listening(world) as seen:
            multipath = b"\x1e\x0c\1\x81" + bytes(8)
            for _ in range(2):
                seen.send(segment(1000, flags=SYN, options=b"\2\4\5\xb4" + multipath))
                await answer(seen, SYN | ACK)
        passed = [each for each in heard() if each[34:36] == struct.pack("!H", 7777)]
    assert [each[54:70] for each in passed] == [b"\2\4\5\xb4" + b"\1" * 12] * 2


async def test_extension_headers_in_a_flow_that_is_granted() -> None:
    async with lab([f"udp:[{GOOD6}]:9000"]) as world, eavesdropping(world) as heard:
        right = frames.udp(GUEST6, GOOD6, 5000, 9000, b"hello")
        for _ in range(2):
            world.send_frame(frame(ip6(GUEST6, GOOD6, UDP, right), kind=IPV6))
        for header, extension in ((60, b"\x11\0\1\4\0\0\0\0"), (0, b"\x11\0\1\4\0\0\0\0"), (44, b"\x11\0\0\1\0\0\0\1"),
                                  (43, b"\x11\2\4\1\0\0\0\0" + ipaddress.IPv6Address(OTHER6).packed)):
            world.send_frame(frame(ip6(GUEST6, GOOD6, header, extension + right), kind=IPV6))
            reason = "fragment" if header == 44 else "options"
            assert (await world.event(action="denied", reason=reason, protocol="ip6")).count == 1
        everyone = ethernet(IPV6, ip6(GUEST6, GOOD6, UDP, right), source=MAC, destination="ff:ff:ff:ff:ff:ff")
        world.send_frame(everyone)
        assert (await world.event(action="denied", reason="malformed")).address == GOOD6
        there = ipaddress.IPv6Address(GOOD6).packed
        passed = {each[20] for each in heard() if each[12:14] == b"\x86\xdd" and each[38:54] == there}
    assert passed == {UDP}


async def test_the_ports_of_an_old_connection(world: Lab) -> None:
    await world.addresses("good.example")
    assert await world.talk(GOOD, 443, client_hello(), sport=6000) == b"reply"
    with pytest.raises(ConnectionResetError):
        await world.talk(GOOD, 443, client_hello("evil.example"), sport=6000)
    assert (await world.event(action="denied", port=443)).reason == "mismatch"


@pytest.mark.parametrize("flags", [ACK, FIN, FIN | ACK, 0, PSH | ACK | FIN, SYN | ACK])
async def test_tcp_without_a_connection(world: Lab, flags: int) -> None:
    await world.addresses("good.example")
    world.send_frame(segment(1, 1, b"data" if flags == ACK else b"", flags=flags))
    assert (await world.event(action="denied", address=GOOD)).reason == "state"
    await reached_nothing(world)


async def test_data_in_a_syn(world: Lab) -> None:
    await world.addresses("good.example")
    world.send_frame(segment(1, flags=SYN, payload=b"data"))
    assert (await world.event(action="denied", address=GOOD)).reason == "early"
    await reached_nothing(world)


@pytest.mark.parametrize("what", SPOOFED)
async def test_frames_that_lie(world: Lab, what: str) -> None:
    sent, reason = SPOOFED[what]
    world.send_frame(sent)
    assert (await world.event(action="denied", reason=reason)).reason == reason
    await reached_nothing(world)


async def test_frames_that_lie_to_a_bridge() -> None:
    async with lab(POLICY, bridge=True) as world, eavesdropping(world) as heard:
        for sent, reason in SPOOFED.values():
            world.send_frame(sent)
            await world.event(action="denied", reason=reason)
        await reached_nothing(world)
        assert not [each for each in heard() if each in {sent for sent, _ in SPOOFED.values()}]
