"""What reads the bytes of guests: it takes what is right, and nothing breaks it."""

from __future__ import annotations

import ipaddress
import struct
import sys
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata.net.policy import answers, dns
from pykata.net.policy.http import Requests, is_http
from pykata.net.policy.packets import BadPacketError, Packet, arp, checksum, macs, packet, plain_syn
from pykata.net.policy.shown import RefusedError
from pykata.net.policy.streams import MOST, Sent
from pykata.net.policy.tls import Handshake, is_tls
from tests import frames
from tests.frames import ACK, FIN, SYN
from tests.netlab import client_hello, record

MAC, OTHER_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
V4, V6 = ("10.0.0.2", "20.0.0.1"), ("fd00::2", "2a00::1")


def framed(payload: bytes, version: int) -> bytes:
    return frames.ethernet(0x0800 if version == 4 else 0x86DD, payload, source=MAC, destination=OTHER_MAC)


def segment(version: int, **options: object) -> bytes:
    source, destination = V4 if version == 4 else V6
    body = frames.tcp(source, destination, 5000, 443, **options)  # type: ignore[arg-type]
    return framed((frames.ip4 if version == 4 else frames.ip6)(source, destination, 6, body), version)


# --- frames ---


@given(st.binary(max_size=200))
def test_any_frame_is_read_or_refused(data: bytes) -> None:
    for read in (macs, arp, packet):
        with suppress(BadPacketError):
            read(data)


@given(st.sampled_from([4, 6]), st.integers(0, 90), st.integers(0, 255))
def test_a_segment_with_one_other_byte_is_never_taken_for_the_same(version: int, at: int, value: int) -> None:
    right = segment(version, flags=ACK, seq=1, ack=2, payload=b"0123456789abcdefghijklmnopqrst")
    at = min(at + 14, len(right) - 1)
    wrong = right[:at] + bytes((value,)) + right[at + 1 :]
    try:
        found = packet(wrong)
    except BadPacketError:
        return
    # What no checksum covers may differ: in IPv6 the traffic class, flow label and hops.
    known = packet(right)
    same = (found.source, found.destination, found.protocol, found.segment) == (
        known.source, known.destination, known.protocol, known.segment)  # fmt: skip
    assert same or wrong == right or found.protocol not in (6, 17)


@pytest.mark.parametrize("version", [4, 6])
def test_what_is_in_a_segment(version: int) -> None:
    found = packet(segment(version, flags=SYN | ACK, seq=7, ack=9, payload=b"data", options=b"\2\4\5\xb4") + b"padding")
    assert (found.name, found.sport, found.dport, found.seq, found.ack) == ("tcp", 5000, 443, 7, 9)
    assert (found.flags, found.payload, found.length) == (SYN | ACK, b"data", 5)


PLAIN = b"\2\4\5\xb4\4\2\x08\x0a\0\0\0\1\0\0\0\0\1\3\3\7"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("options", "plain"), [
    (PLAIN, PLAIN), (b"", b""),
    (PLAIN + b"\x1e\x0c\1\x81" + bytes(8), PLAIN + b"\1" * 12),            # Multipath TCP
    (b"\x22\2\1\1" + PLAIN, b"\1" * 4 + PLAIN), (b"\x22\x0a" + bytes(8) + b"\1\1", b"\1" * 12),     # Fast Open
    (b"\x45\4\1\0", b"\1" * 4), (b"\2\0\0\0", bytes(4)), (b"\2\x09\0\0", bytes(4)), (b"\1\1\1\2", b"\1\1\1\0"),
    (b"\0\x1e\3\1", bytes(4)),
])  # fmt: skip
def test_what_a_syn_may_agree_on(version: int, options: bytes, plain: bytes) -> None:
    sent = packet(segment(version, flags=SYN, seq=7, options=options) + b"padding")
    found = packet(plain_syn(sent))     # whose checksum is right, or this would fail
    assert found.segment[20:] == plain
    assert found.segment[:16] == sent.segment[:16]
    assert found.frame.endswith(b"padding")


@given(st.binary(max_size=40))
def test_any_options_of_a_syn(options: bytes) -> None:
    options = options[: len(options) // 4 * 4]
    plain = packet(plain_syn(packet(segment(4, flags=SYN, options=options)))).segment[20:]
    assert len(plain) == len(options)
    assert packet(plain_syn(packet(segment(4, flags=SYN, options=plain)))).segment[20:] == plain


@given(st.binary(max_size=70))
def test_checksums_are_the_internets(data: bytes) -> None:
    total = sum(struct.unpack(f"!{len(data + bytes(len(data) % 2)) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert checksum(data) == total ^ 0xFFFF


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("flags", [SYN, ACK, FIN | ACK, 0])
def test_answers_are_right_frames(version: int, flags: int) -> None:
    asked = packet(segment(version, flags=flags, seq=100, ack=200, payload=b"abc"))
    reset, error = answers.reset(asked), answers.prohibited(asked)
    assert reset is not None
    back = packet(reset)
    assert (back.source, back.destination, back.dport) == (asked.destination, asked.source, 5000)
    # RFC 9293, 3.10.7.1: it is where the other one would expect the next byte.
    assert (back.seq, back.ack) == ((200, 0) if flags & ACK else (0, 100 + asked.length))
    assert packet(error).protocol == (1 if version == 4 else 58)
    assert asked.frame[14:54] in error
    assert answers.reset(back) is None
    onward = packet(answers.reset_onward(asked))
    assert (onward.source, onward.seq, onward.frame[:12]) == (asked.source, 100, asked.frame[:12])
    assert packet(answers.datagram(_datagram(version), b"answer")).payload == b"answer"


def _datagram(version: int) -> Packet:
    source, destination = V4 if version == 4 else V6
    body = frames.udp(source, destination, 5000, 53, b"?")
    return packet(framed((frames.ip4 if version == 4 else frames.ip6)(source, destination, 17, body), version))


# --- TLS ---


def names(*pieces: bytes) -> tuple[list[str], bool]:
    """The names that are shown, and whether it is clear that there will be no other."""
    reader = Handshake()
    found = [name for piece in pieces for name in reader.feed(piece)]
    return found, reader.done


def refused(*pieces: bytes) -> str:
    """The reason for which it is."""
    with pytest.raises(RefusedError) as caught:
        names(*pieces)
    return caught.value.reason


@given(st.binary(max_size=300))
def test_any_bytes_are_no_client_hello(data: bytes) -> None:
    with suppress(RefusedError):
        assert names(b"\x16\x03\x01" + data) == ([], False)


@given(st.integers(0, 516), st.integers(0, 255))
def test_a_client_hello_with_one_other_byte(at: int, value: int) -> None:
    hello = HELLO[:at] + bytes((value,)) + HELLO[at + 1 :]
    with suppress(RefusedError):
        for name in names(hello)[0]:
            assert name.replace(".", "").replace("-", "").replace("_", "").isalnum()


HELLO, EVIL = client_hello(), client_hello("evil.example")
CHANGE, WARNING = record(20, b"\1"), record(21, b"\1\x5a")
GOOD = ["good.example"]


def test_a_client_hello_in_pieces() -> None:
    for end in range(len(HELLO)):
        assert names(HELLO[:end]) == ([], False)
        assert names(HELLO[:end], HELLO[end:]) == (GOOD, False)


@given(st.lists(st.integers(1, 512), max_size=6))
def test_a_client_hello_in_records(cuts: list[int]) -> None:
    body, at, records = HELLO[5:], 0, b""
    for end in (*sorted(set(cuts)), len(body)):
        piece, at = body[at:end], end
        records += record(22, piece) if piece else b""
    assert names(records) == (GOOD, False)


@pytest.mark.parametrize("next_one", [
    record(22, b"\x10\0\0\x01a"), record(23, bytes(40)), CHANGE + record(23, bytes(40)), record(21, b"\2\x28"),
    CHANGE + record(22, b"\x07" + bytes(40)), CHANGE + record(22, b"\1\xff\0\0" + bytes(40)),
])  # fmt: skip
def test_what_follows_when_the_server_has_chosen(next_one: bytes) -> None:
    assert names(HELLO + next_one) == (GOOD, True)


@pytest.mark.parametrize("between", [b"", CHANGE, WARNING, CHANGE + WARNING])
def test_a_second_client_hello(between: bytes) -> None:
    assert names(HELLO, between + EVIL) == ([*GOOD, "evil.example"], False)
    assert names(HELLO, between, HELLO, record(23, bytes(40))) == (GOOD * 2, True)
    pieces = [record(22, EVIL[5:][at : at + 3]) for at in range(0, len(EVIL) - 5, 3)]
    assert names(HELLO, between, *pieces) == ([*GOOD, "evil.example"], False)
    assert refused(HELLO, between, HELLO, HELLO) == "tls"


@pytest.mark.parametrize("data", [
    record(22, HELLO[5:] + EVIL[5:]), HELLO + CHANGE * 2, HELLO + record(20, b"\2"), HELLO + WARNING * 6,
    WARNING + EVIL, record(22, HELLO[5:50]) + WARNING, record(22, b""), HELLO + b"more", b"\x80\x2e\1\3\1",
    record(22, b"\1\1\0\0"),
])  # fmt: skip
def test_what_servers_could_read_in_another_way(data: bytes) -> None:
    assert refused(data) == "tls"


def extended(kind: int, body: bytes) -> bytes:
    """The ClientHello with an extension more."""
    hello = HELLO[9:]
    at = 34 + 1 + hello[34]
    at += 2 + int.from_bytes(hello[at : at + 2])
    at += 1 + hello[at]
    extensions = hello[at + 2 :] + struct.pack("!HH", kind, len(body)) + body
    hello = hello[:at] + struct.pack("!H", len(extensions)) + extensions
    message = b"\x01" + struct.pack("!I", len(hello))[1:] + hello
    return b"\x16\x03\x01" + struct.pack("!H", len(message)) + message


def test_extensions_that_are_made_up_and_those_that_hide() -> None:
    assert names(extended(0x0A0A, b"grease")) == (GOOD, False)
    # Encrypted names, now and in drafts; a second server name; data before the answer.
    for kind, reason in ((0xFE0D, "ech"), (0xFE0A, "ech"), (0xFFCE, "ech"), (0, "tls"), (42, "early")):
        assert refused(extended(kind, b"\0" * 20)) == reason
    assert refused(client_hello(None)) == "sni"


@pytest.mark.parametrize(("data", "found"), [
    (HELLO, True), (b"\x16", None), (WARNING, True), (b"\x80\x2e\1\3", True), (b"\x80\x2e", None), (b"", None),
    (b"\x16\x02", False), (b"GET", False), (b"\x80\x2e\2", False), (b"\x80\x2e\1\7", False),
])  # fmt: skip
def test_what_is_tls(data: bytes, found: bool | None) -> None:
    assert is_tls(data) is found


# --- HTTP ---

HEAD = b"POST /x HTTP/1.1\r\nHost: a.example:80\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"PUT / HTTP/1.1\r\nhost: b.example\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nT: 1\r\n\r\n"


@given(st.lists(st.sampled_from([HEAD, CHUNKED]), max_size=5), st.lists(st.integers(0, 500), max_size=8))
def test_requests_in_any_pieces(requests: list[bytes], cuts: list[int]) -> None:
    data, reader, hosts, at = b"".join(requests), Requests(), [], 0
    for end in (*sorted(cuts), len(data)):
        hosts += reader.feed(data[at:end])
        at = max(at, min(end, len(data)))
    assert hosts == ["a.example" if each is HEAD else "b.example" for each in requests]


@given(st.binary(max_size=300), st.sampled_from([b"", HEAD, HEAD[:40], CHUNKED[:-5], CHUNKED[:70]]))
def test_any_bytes_are_requests_or_refused(data: bytes, before: bytes) -> None:
    reader = Requests()
    with suppress(RefusedError):
        reader.feed(before)
        reader.feed(data)


def test_heads_lines_and_bodies_have_an_end() -> None:
    for start, more in ((b"GET / HTTP/1.1\r\n", b"A: b\r\n" * 100), (CHUNKED[:71], b"0" * 100)):
        reader = Requests()
        reader.feed(start)
        with pytest.raises(RefusedError):
            reader.feed(more * 1000)


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\nHost: evil.example\n\n", b"GET / HTTP/1.1\r\nHost: evil.example\n\n", b"GET http://evil.example/\r\n",
    b"GET / HTTP/1.1\rHost: evil.example\r\r", b"GET / HTTP/1.1\r\nA: b\r\n \r\n", b"GET / HTTP/1.1\r\nA: b\0",
    b"POST / HTTP/1.0\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n", b"get / HTTP/1.1\r\n",
    CHUNKED[:-5] + b"0\r\r", CHUNKED[:-5] + b"0\n", CHUNKED[:69] + b"abcd",
])  # fmt: skip
def test_what_is_refused_before_a_server_could_act_on_it(data: bytes) -> None:
    for size in (1, len(data)):
        with pytest.raises(RefusedError):
            read(data, size)


def read(data: bytes, size: int) -> None:
    reader = Requests()
    for at in range(0, len(data), size):
        assert reader.feed(data[at : at + size]) in ([], ["b.example"])


@pytest.mark.parametrize(("data", "http"), [
    (b"GET / HTTP/1.1\r\n", True), (b"\r\nGET / HTTP/1.0\n", True), (b"PRI * HTTP/2.0\r\n", True), (b"GET /", None),
    (b"EHLO me\r\n", False), (b"SSH-2.0-x\r\n", False), (b"\0\1", False), (b"", None), (b"user x", None),
    (b"user x\r\n", False), (b"get / http/1.1\r\n", True), (b"GET\t/\tHTTP/1.1\n", True), (b" GET / HTTP/1.1\r", True),
    (b"x" * 20000, False),
])  # fmt: skip
def test_what_is_http(data: bytes, http: bool | None) -> None:
    assert is_http(data) is http


# --- DNS ---


@given(st.binary(max_size=100))
def test_any_bytes_are_a_question_or_refused(data: bytes) -> None:
    try:
        found = dns.question(data)
    except RefusedError:
        return
    dns.refusal(found, "why")
    dns.empty(found)


@given(st.binary(max_size=60), st.integers(0, 60))
def test_a_question_with_other_bytes(data: bytes, at: int) -> None:
    import dns.message as messages

    right = messages.make_query("good.example", "A", use_edns=0).to_wire()
    try:
        found = dns.question(right[:at] + data + right[at + len(data) :])
    except RefusedError:
        return
    dns.refusal(found, "why")
    dns.query(found).to_wire()


@pytest.mark.parametrize("name", [b"\xc0\x0c", b"\1a\xc0\x0c", b"\xc0\x0e\xc0\x0c", b"\xc0\xff", b"\x3f" + bytes(63)])
def test_compression_that_has_no_end(name: bytes) -> None:
    with pytest.raises(RefusedError):
        dns.question(b"\0\1\1\0\0\1\0\0\0\0\0\0" + name + b"\0\1\0\1")


def test_a_name_that_leads_in_circles() -> None:
    import dns.message as messages

    query = messages.make_query("a.example", "A")
    asked = dns.question(query.to_wire())
    for target in ("a.example.", "b.example."):
        lines = f";ANSWER\na.example. 60 IN CNAME {target}\nb.example. 60 IN CNAME a.example.\n"
        answer = messages.from_text(f"id 1\nopcode QUERY\nrcode NOERROR\nflags QR\n;QUESTION\na.example. IN A\n{lines}")
        with pytest.raises(RefusedError, match="contradicts itself"):
            dns.found(asked, answer, lambda _: True)


def test_what_does_not_belong_to_a_question() -> None:
    import dns.message as messages

    asked = dns.question(messages.make_query("a.example", "A").to_wire())
    lines = "a.example. 9999999 IN A 20.0.0.1\nb.example. 60 IN A 20.0.0.2\n;ADDITIONAL\nb.example. 60 IN A 20.0.0.3\n"
    head = "id 1\nopcode QUERY\nrcode NOERROR\nflags QR\n;QUESTION\na.example. IN A\n;ANSWER\n"
    found = dns.found(asked, messages.from_text(head + lines), lambda _: True)
    assert found.addresses == (ipaddress.ip_address("20.0.0.1"),)
    assert found.ttl == 3600
    assert b"\x14\0\0\2" not in found.wire


# --- streams ---


@given(
    st.integers(0, 2**32 - 1), st.binary(min_size=1, max_size=60),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20))),
)  # fmt: skip
def test_segments_in_any_order(start: int, data: bytes, pieces: list[tuple[int, int]]) -> None:
    sent, taken = Sent(start), b""
    for at, length in (*pieces, (0, len(data))):
        seq = start + min(at, len(data)) & 0xFFFFFFFF
        taken += sent.take(seq, data[at : at + length]) or b""
        sent.acknowledge(start + len(taken) & 0xFFFFFFFF)
        if at % 2:
            sent.forget()
    assert taken == data
    assert sent.length == len(data)


def test_rewriting_is_noticed_until_it_is_acknowledged() -> None:
    sent = Sent(2**32 - 2)
    assert sent.take(2**32 - 2, b"abcd") == b"abcd"
    with pytest.raises(RefusedError, match="other bytes"):
        sent.take(0, b"xd")
    sent.acknowledge(2)
    sent.forget()
    assert sent.take(0, b"xde") == b"e"     # the server has the two that differ
    assert sent.take(9, b"too early") is None
    assert sent.take(3, b"x" * MOST) is None
    sent.acknowledge(2**31)                 # of what wasn't sent
    assert sent.acknowledged == 4


def test_little_is_imported_before_it_is_needed() -> None:
    import subprocess

    code = (
        "import sys, pykata; pykata.Network(allow=['a.example']); "
        "print(*(x in sys.modules for x in ('dns', 'pyroute2')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
