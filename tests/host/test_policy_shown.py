"""Attempts to get out past a policy by connections that are for somebody else than they show: refused, and told."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator

import pytest

from tests.attempts import GET, POLICY, cut, reached_nothing, refused
from tests.netlab import GOOD, OTHER, Lab, client_hello, lab, record


@pytest.fixture
async def world() -> AsyncIterator[Lab]:
    async with lab(POLICY) as found:
        yield found


async def test_another_name_in_tls(world: Lab) -> None:
    await cut(world, 443, client_hello("evil.example"), reason="mismatch")
    await reached_nothing(world)


async def test_an_allowed_name_that_leads_elsewhere(world: Lab) -> None:
    await world.addresses("a.wild.example")
    await cut(world, 443, client_hello("a.wild.example"), reason="mismatch")


async def test_tls_without_a_name(world: Lab) -> None:
    await cut(world, 443, client_hello(None), reason="sni")


async def test_tls_in_small_pieces(world: Lab) -> None:
    hello = client_hello("evil.example")
    at = hello.index(b"evil")
    await cut(world, 443, hello[:3], hello[3 : at + 2], hello[at + 2 :], reason="mismatch")


async def test_tls_with_a_name_in_two_records(world: Lab) -> None:
    body = client_hello("evil.example")[5:]
    at = body.index(b"evil") + 2
    records = b"".join(b"\x16\x03\x01" + struct.pack("!H", len(each)) + each for each in (body[:at], body[at:]))
    await cut(world, 443, records, reason="mismatch")


@pytest.mark.parametrize("between", [b"", record(20, b"\1"), record(21, b"\1\x5a")], ids=["", "change", "warning"])
async def test_another_name_when_the_server_asks_again(world: Lab, between: bytes) -> None:
    # A server that wants other keys asks for a second ClientHello (HelloRetryRequest), and takes the name of that.
    await cut(world, 443, client_hello(), between + client_hello("evil.example"), reason="mismatch")
    await cut(world, 8080, client_hello(), between + client_hello("evil.example"), reason="mismatch")


async def test_one_client_hello_behind_the_other(world: Lab) -> None:
    await cut(world, 443, client_hello() + client_hello("evil.example"), reason="mismatch")
    await cut(world, 443, record(22, client_hello()[5:] + client_hello("evil.example")[5:]), reason="tls")


@pytest.mark.parametrize("first", [record(21, b"\1\x5a"), record(20, b"\1"), b"\x80\x2e\1\3\1"])
async def test_what_servers_may_take_for_tls_on_another_port(world: Lab, first: bytes) -> None:
    await cut(world, 8080, first + client_hello("evil.example"), reason="tls")


async def test_http_where_tls_should_be(world: Lab) -> None:
    await cut(world, 443, GET % b"good.example", reason="tls")


async def test_tls_where_http_should_be(world: Lab) -> None:
    await cut(world, 80, client_hello(), reason="http")


async def test_ssh_where_http_should_be(world: Lab) -> None:
    await cut(world, 80, b"SSH-2.0-OpenSSH_9.2\r\n", reason="http")


async def test_another_host_in_http(world: Lab) -> None:
    await cut(world, 80, GET % b"evil.example", reason="mismatch")


async def test_http_to_an_address(world: Lab) -> None:
    await cut(world, 80, GET % GOOD.encode(), reason="mismatch")


async def test_http_without_a_host(world: Lab) -> None:
    await cut(world, 80, b"GET / HTTP/1.0\r\n\r\n", reason="host")


async def test_two_hosts(world: Lab) -> None:
    await cut(world, 80, b"GET / HTTP/1.1\r\nHost: good.example\r\nHost: evil.example\r\n\r\n", reason="host")


async def test_another_host_in_the_line_of_a_request(world: Lab) -> None:
    await cut(world, 80, b"GET http://evil.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n", reason="host")


async def test_a_tunnel(world: Lab) -> None:
    await cut(world, 80, b"CONNECT evil.example:443 HTTP/1.1\r\nHost: good.example\r\n\r\n", reason="connect")


async def test_another_host_on_another_port(world: Lab) -> None:
    await cut(world, 8080, GET % b"evil.example", reason="mismatch")
    await cut(world, 8080, client_hello("evil.example"), reason="mismatch")


async def test_a_second_request_for_another_host(world: Lab) -> None:
    good, evil = GET % b"good.example", GET % b"evil.example"
    await cut(world, 80, good, evil, reason="mismatch")


async def test_a_second_request_behind_the_first_one(world: Lab) -> None:
    await cut(world, 80, GET % b"good.example" + GET % b"evil.example", reason="mismatch")


@pytest.mark.parametrize("fields", [
    b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"Content-Length: 4\r\nContent-Length: 5",
    b"Transfer-Encoding : chunked", b"Transfer-Encoding: xchunked", b" Host: evil.example", b"Upgrade: h2c",
    b"Content-Length: +4", b"X: \nHost: evil.example",
])  # fmt: skip
async def test_requests_that_can_be_read_in_two_ways(world: Lab, fields: bytes) -> None:
    request = b"POST / HTTP/1.1\r\nHost: good.example\r\n" + fields + b"\r\n\r\n" + GET % b"evil.example"
    await cut(world, 80, request, reason="upgrade" if b"h2c" in fields else "http")


@pytest.mark.parametrize("request_", [
    b"GET / HTTP/1.1\nHost: evil.example\n\n", b"GET http://evil.example/\r\n", b"GET /\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"get / HTTP/1.1\r\nHost: good.example\r\n\r\n",
    b"\r\n" + GET % b"evil.example", b"GET / HTTP/1.1\rHost: evil.example\r\r", b"GET\t/\tHTTP/1.1\r\n",
    b"POST / HTTP/1.0\r\nHost: good.example\r\nTransfer-Encoding: chunked\r\n\r\n",
], ids=str)  # fmt: skip
async def test_requests_that_only_some_servers_take(world: Lab, request_: bytes) -> None:
    await cut(world, 80, request_, reason="http")


async def test_they_are_found_on_other_ports(world: Lab) -> None:
    for request in (b"GET / HTTP/1.1\nHost: evil.example\n\n", b" GET\t/\thttp/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\n"):
        await cut(world, 8080, request, reason="http")
    await cut(world, 8080, b"get /", b" HTTP/1.1\r\n", reason="http")


async def test_a_websocket(world: Lab) -> None:
    fields = b"Host: good.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    await cut(world, 80, b"GET / HTTP/1.1\r\n" + fields, reason="upgrade")


async def test_a_request_in_the_body_of_another_one(world: Lab) -> None:
    head = b"POST / HTTP/1.1\r\nHost: good.example\r\nContent-Length: %d\r\n\r\n"
    evil = GET % b"evil.example"
    await cut(world, 80, head % (len(evil) - 1) + b"x" * (len(evil) - 1), evil, reason="mismatch")


async def test_a_redirect_elsewhere(world: Lab) -> None:
    world.world.reply = b"HTTP/1.1 302 Found\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n"
    await world.addresses("good.example")
    assert b"302" in await world.talk(GOOD, 80, GET % b"good.example")
    assert await world.addresses("evil.example") == []      # what a client does next
    await world.event(action="denied", name="evil.example")
    with refused():
        await world.connect(OTHER, 80)
    assert set(world.world.received) == {(GOOD, 80)}
