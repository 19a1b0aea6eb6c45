"""Published UDP ports: each client gets a socket of its own in the guest's namespace, by which answers find back."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import anyio
from attrs import define, field

from pykata.errors import NetworkError
from pykata.net.netns import Netns, socket_in

log = logging.getLogger(__name__)

DATAGRAM = 65536
CLIENTS = 256           # of one port at a time; a new one takes the place of the one that was silent for longest
IDLE = 120.0            # seconds without a datagram, after which a client is forgotten (RFC 4787 REQ-5)


def family_of(address: str) -> int:
    """Of the sockets for an IP address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@define(eq=False)
class _Client:
    """Someone who sent us a datagram."""

    address: Any
    guest: socket.socket
    scope: anyio.CancelScope = field(factory=anyio.CancelScope)
    used: float = 0.0


async def datagrams(listener: socket.socket, netns: Netns, target: tuple[str, int]) -> None:
    """Pass datagrams on, both ways, until cancelled."""
    loop = asyncio.get_running_loop()
    clients: dict[Any, _Client] = {}
    async with anyio.create_task_group() as group:
        while True:
            try:
                data, address = await loop.sock_recvfrom(listener, DATAGRAM)
                client = clients.get(address)
                if client is None:
                    client = _new(clients, address, netns, target)
                    group.start_soon(_answers, client, listener, clients)
                _use(client)
                client.guest.send(data)
            except (BlockingIOError, ConnectionRefusedError):
                continue        # as UDP does: what can't be sent is lost
            except (OSError, NetworkError) as exc:
                log.debug("a datagram to port %d of the guest was lost: %s", target[1], exc)
                await asyncio.sleep(0)


def _new(clients: dict[Any, _Client], address: Any, netns: Netns, target: tuple[str, int]) -> _Client:
    if len(clients) >= CLIENTS:
        silent = min(clients.values(), key=lambda each: each.used)
        del clients[silent.address]
        silent.scope.cancel()
    guest = socket_in(netns, family_of(target[0]), socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        guest.setblocking(False)
        guest.connect(target)
    except OSError:
        guest.close()
        raise
    clients[address] = client = _Client(address, guest)
    return client


def _use(client: _Client) -> None:
    client.used = anyio.current_time()
    client.scope.deadline = client.used + IDLE


async def _answers(client: _Client, listener: socket.socket, clients: dict[Any, _Client]) -> None:
    """What the guest sends back, until the client was silent for long."""
    loop = asyncio.get_running_loop()
    with client.guest, client.scope:
        while True:
            try:
                data = await loop.sock_recv(client.guest, DATAGRAM)
                _use(client)
                listener.sendto(data, client.address)
            except ConnectionRefusedError:      # nobody listens in the guest, or the client doesn't any more
                continue
            except OSError as exc:
                log.debug("a datagram from the guest was lost: %s", exc)
                await asyncio.sleep(0)
    if clients.get(client.address) is client:
        del clients[client.address]
