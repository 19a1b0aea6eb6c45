"""What a guest may send to QEMU's own network, judged frame by frame."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata.net.policy.packets import checksum
from pykata.net.sieve import ACK, ICMP, LARGEST, SYN, TCP, UDP, End, Sieve, from_guest, refusal, to_guest
from pykata.net.user_qemu import DNS, GATEWAY, GUEST, NOWHERE

REFUSED = [*NOWHERE, "169.254.0.0/16", "192.0.2.9/32"]
FREE, HOST = "198.51.100.1", "192.0.2.9"
MACS = b"\x52\x55\x0a\0\x02\x02" + b"\x52\x54\0\1\2\3"
RST = 4


def frame(
    to: str, protocol: int = TCP, port: int = 80, flags: int = SYN, *, fragment: int = 0, options: int = 0
) -> bytes:
    ports = struct.pack("!HH", 40000, port)
    body = ports + (struct.pack("!IIBBHHH", 1, 0, 5 << 4, flags, 1024, 0, 0) if protocol == TCP else bytes(8))
    addresses = socket.inet_aton(GUEST) + socket.inet_aton(to)
    head = struct.pack("!BBHHHBBH", 0x45 + options, 0, 20 + 4 * options + len(body), 1, fragment, 64, protocol, 0)
    return MACS + b"\x08\x00" + head + addresses + bytes(4 * options) + body


def passes(packet: bytes, *, answers: bool = True) -> bool:
    return Sieve(DNS, REFUSED, answers=answers).passes(packet)


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_what_is_free_passes(protocol: int) -> None:
    assert passes(frame(FREE, protocol))
    assert passes(frame(FREE, protocol, fragment=0x2000))
    assert passes(frame(FREE, protocol, options=3))


def test_arp_passes() -> None:
    assert passes(MACS + b"\x08\x06" + bytes(28))


@pytest.mark.parametrize("to", [
    GATEWAY, "10.0.2.1", "10.0.2.255", "127.0.0.1", "127.9.9.9", "0.0.0.0", "0.0.0.1", "255.255.255.255", "224.0.0.251",  # noqa: S104
    "169.254.169.254", HOST,
])  # fmt: skip
def test_the_host_by_any_name_is_refused(to: str) -> None:
    for packet in (
        frame(to), frame(to, UDP), frame(to, ICMP), frame(to, flags=SYN | RST), frame(to, options=10),
        frame(to, flags=ACK, fragment=0x2000), frame(to, flags=ACK, fragment=1), frame(to, UDP, port=53),
    ):  # fmt: skip
        assert not passes(packet)


def test_answers_to_those_who_came_pass_only_where_ports_are_published() -> None:
    for flags in (ACK, SYN | ACK, RST, RST | ACK):
        assert passes(frame(GATEWAY, flags=flags))
        assert not passes(frame(GATEWAY, flags=flags), answers=False)


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_at_the_name_servers_address_nothing_but_names_is_reached(protocol: int) -> None:
    assert passes(frame(DNS, protocol, 53))
    assert passes(frame(DNS, protocol, 53, options=2))
    for packet in (frame(DNS, protocol, 22), frame(DNS, protocol, 53, fragment=0x2000), frame(DNS, ICMP)):
        assert not passes(packet)


@pytest.mark.parametrize("packet", [
    b"", MACS, MACS + b"\x08\x00", MACS + b"\x86\xdd" + bytes(60), MACS + b"\x81\x00\0\1\x08\x00" + frame(FREE)[14:],
    frame(FREE, 41), frame(FREE).replace(b"\x45", b"\x65", 1), frame(FREE).replace(b"\x45", b"\x44", 1),
    frame(FREE)[:33],
])  # fmt: skip
def test_what_is_not_understood_is_refused(packet: bytes) -> None:
    assert not passes(packet)


@given(st.binary(max_size=90), st.sampled_from(sorted(REFUSED)), st.booleans())
def test_no_bytes_get_a_connection_to_begin_where_it_is_refused(tail: bytes, where: str, answers: bool) -> None:
    to = str(ipaddress.ip_network(where)[0])
    packet = frame(to)[:14] + tail[:16] + socket.inet_aton(to) + tail[16:]
    if passes(packet, answers=answers):
        assert answers
        assert tail[9] == TCP
        begins = 14 + (tail[0] & 15) * 4
        assert packet[begins + 13] & (SYN | ACK) != SYN


@given(st.binary(max_size=120))
def test_any_bytes_are_judged_and_answered(packet: bytes) -> None:
    passes(packet)
    refusal(packet)


def test_the_guest_is_told() -> None:
    sent = frame(HOST)
    told = refusal(sent)
    assert told[:12] == sent[6:12] + sent[:6]
    assert told[26:34] == sent[30:34] + sent[26:30]
    assert told[34:36] == bytes((3, 13))
    assert told[42:70] == sent[14:42]
    assert checksum(told[14:34]) == checksum(told[34:]) == 0
    assert refusal(frame(HOST, ICMP)) == refusal(frame(HOST, UDP, fragment=9)) == b""


def ends() -> tuple[End, socket.socket, End, socket.socket]:
    (one, guest), (two, uplink) = socket.socketpair(), socket.socketpair()
    return End(one.detach()), guest, End(two.detach()), uplink


def test_frames_in_pieces_come_out_whole_and_in_order() -> None:
    inner, guest, outer, uplink = ends()
    good, bad = frame(FREE), frame(HOST)
    stream = b"".join(len(each).to_bytes(4, "big") + each for each in (good, bad, good))
    with inner.socket, guest, outer.socket, uplink:
        for at in range(0, len(stream), 7):
            guest.send(stream[at : at + 7])
            from_guest(inner, outer, Sieve(DNS, REFUSED, answers=False))
        framed = len(good).to_bytes(4, "big") + good
        assert bytes(outer.waiting) == framed * 2
        told = bytes(inner.waiting)
        assert told[4:] == refusal(bad)
        # What comes back may not cut it in two.
        uplink.send(framed + framed[:9])
        to_guest(inner, outer)
        assert bytes(inner.waiting) == told + framed
        uplink.send(framed[9:])
        to_guest(inner, outer)
        assert bytes(inner.waiting) == told + framed * 2
        inner.flush()
        assert guest.recv(65536) == told + framed * 2


def test_a_frame_larger_than_any_ends_it() -> None:
    inner, guest, outer, uplink = ends()
    with inner.socket, guest, outer.socket, uplink:
        guest.send((LARGEST + 1).to_bytes(4, "big"))
        with pytest.raises(SystemExit, match="announced a frame"):
            from_guest(inner, outer, Sieve(DNS, REFUSED, answers=False))
