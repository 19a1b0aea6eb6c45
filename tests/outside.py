"""A network beyond the host, for tests: a namespace at the end of a veth, with servers of the test's own. Root's."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
from attrs import frozen

from pykata.host import finish
from pykata.net import netns as namespaces
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, socket_in
from pykata.spec import Port

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

CONTENT = os.urandom(1 << 16) * 64
"""What :func:`serve` has for who asks for all."""


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server of lines: ``all`` gets the CONTENT, ``count`` the number of bytes that follow it, another one a word."""
    said = await reader.readline()
    if said == b"count\n":
        total = 0
        while piece := await reader.read(1 << 16):
            total += len(piece)
        writer.write(b"%d\n" % total)
    else:
        writer.write(CONTENT if said == b"all\n" else b"hello from outside\n")


@frozen
class Outside:
    """Addresses at the far end of the veth, which nobody else has: several test runs may share the machine."""

    netns: Netns
    address: str
    address6: str
    near: str               # the host's own, on that network

    @asynccontextmanager
    async def tcp(self, serve: Serve, port: int, *, family: int = socket.AF_INET) -> AsyncIterator[None]:
        """A server there, on all addresses of the family."""
        listener = socket_in(self.netns, family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))  # noqa: S104
        server = await asyncio.start_server(_closing(serve), sock=listener)
        try:
            yield
        finally:
            server.close()
            await finish(server.wait_closed())

    @asynccontextmanager
    async def udp(self, answer: Callable[[bytes], bytes | None], port: int) -> AsyncIterator[None]:
        """Answers datagrams there."""
        sock = socket_in(self.netns, socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        sock.bind(("0.0.0.0", port))  # noqa: S104
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: _Answering(answer), sock=sock)
        try:
            yield
        finally:
            transport.close()
            await asyncio.sleep(0)

    @asynccontextmanager
    async def resolver(self, names: Mapping[str, str]) -> AsyncIterator[None]:
        """A name server there that knows these IPv4 addresses."""
        async with self.udp(lambda query: _resolved(query, names), 53):
            yield


@asynccontextmanager
async def outside() -> AsyncIterator[Outside]:
    """Make it, and take it down."""
    one, two = os.urandom(2)
    name = f"pk{os.urandom(4).hex()}"
    near, far = f"10.{200 + one % 50}.{two}.1", f"10.{200 + one % 50}.{two}.2"
    near6, far6 = f"fd77:{one:x}:{two:x}::1", f"fd77:{one:x}:{two:x}::2"
    async with AsyncExitStack() as stack:
        netns = await stack.enter_async_context(namespaces.made())
        with namespaces.opened() as host:
            async with netlink(host) as kernel:
                link = await kernel.add(name, "veth", peer={"ifname": "eth0", "net_ns_fd": netns.fd})
                try:
                    for address in (f"{near}/24", f"{near6}/64"):
                        await kernel.add_address(link.index, address)
                    await kernel.up(link.index, ifalias=os.environ["PYKATA_RUN"])       # whose it is
                    async with netlink(netns) as beyond:
                        eth0 = await beyond.link("eth0")
                        for address in (f"{far}/24", f"{far6}/64"):
                            await beyond.add_address(eth0.index, address)
                        await beyond.up(eth0.index)
                    yield Outside(netns, far, far6, near)
                finally:
                    await finish(kernel.delete(link.index))


class _Answering(asyncio.DatagramProtocol):
    def __init__(self, answer: Callable[[bytes], bytes | None]) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: object) -> None:
        if (answer := self._answer(data)) is not None:
            self._transport.sendto(answer, address)     # type: ignore[attr-defined]


def _closing(serve: Serve) -> Serve:
    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    return served


def _resolved(query: bytes, names: Mapping[str, str]) -> bytes:
    question = dns.message.from_wire(query)
    answer = dns.message.make_response(question)
    for each in question.question:
        address = names.get(each.name.to_text(omit_final_dot=True).lower())
        if address is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif each.rdtype == dns.rdatatype.A:
            answer.answer.append(dns.rrset.from_text(each.name, 60, "IN", "A", address))
    return answer.to_wire()


async def got(port: Port) -> bytes:
    """What the server behind a published port answers to a request."""
    reader, writer = await asyncio.open_connection(port.address, port.host)
    try:
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
