"""Published ports: what connects to a socket of the host is connected to the guest."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress

import anyio
from attrs import evolve, frozen

from pykata.errors import NetworkError, NotPermittedError, PortInUseError
from pykata.host import finish
from pykata.net.netns import Netns, socket_in
from pykata.net.relay_udp import datagrams, family_of
from pykata.spec import Port

log = logging.getLogger(__name__)

CHUNK = 256 * 1024
CONNECTIONS = 1024          # of one port at a time; further ones wait in the queue of its socket
BACKLOG = 128
DIAL = 10.0                 # seconds in which a guest has to answer
ABORT = struct.pack("ii", 1, 0)     # SO_LINGER: close with a reset


@frozen
class Listener:
    """A published port with its socket, which is bound already."""

    port: Port
    socket: socket.socket


@contextmanager
def bound(ports: Sequence[Port], *, listening: bool = True) -> Iterator[tuple[Listener, ...]]:
    """Sockets for all ports, with real numbers, before anything else is started. Raises PortInUseError, HostError.

    Those that aren't ``listening`` only keep the ports, for a program that does.
    """
    with ExitStack() as stack:
        listeners = []
        for port in ports:
            sock = stack.enter_context(_socket(port, listening=listening))
            listeners.append(Listener(evolve(port, host=sock.getsockname()[1]), sock))
        yield tuple(listeners)


def _socket(port: Port, *, listening: bool) -> socket.socket:
    family = family_of(port.address)
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            # Connections of a sandbox that has ended may linger; another listener would still be in the way.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((port.address, port.host))
        if kind == socket.SOCK_STREAM and listening:
            sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise _explained(exc, f"{port.address}:{port.host}/{port.protocol}") from exc
    return sock


def _explained(exc: OSError, where: str) -> NetworkError | NotPermittedError:
    if exc.errno == errno.EADDRINUSE:
        return PortInUseError(f"port {where} is in use", hint="choose another one, or 0 for any free one")
    if exc.errno in (errno.EACCES, errno.EPERM):
        return NotPermittedError(f"port {where} may not be used: {exc.strerror}", hint="choose one above 1023")
    return NetworkError(f"port {where} can't be published: {exc.strerror}")


@asynccontextmanager
async def relayed(
    listeners: Sequence[Listener], netns: Netns, addresses: Sequence[str]
) -> AsyncIterator[tuple[Port, ...]]:
    """Relay what comes to the listeners to the guest, while the block runs.

    It is dialled from the namespace, at the first of its ``addresses`` (with or without a prefix).
    """
    if not listeners:
        yield ()
        return
    guest = addresses[0].partition("/")[0]
    # A task of its own: a task group that was open over the yield would end the block with an exception group.
    task = asyncio.ensure_future(_relay(listeners, netns, guest))
    try:
        yield tuple(each.port for each in listeners)
    finally:
        task.cancel()
        await finish(_over(task))


async def _over(task: asyncio.Future[None]) -> None:
    await asyncio.wait({task})
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.error("publishing ports failed", exc_info=failure)


async def _relay(listeners: Sequence[Listener], netns: Netns, guest: str) -> None:
    async with anyio.create_task_group() as group:
        for each in listeners:
            work = _connections if each.port.protocol == "tcp" else datagrams
            group.start_soon(work, each.socket, netns, (guest, each.port.guest))


async def _connections(listener: socket.socket, netns: Netns, target: tuple[str, int]) -> None:
    room = anyio.CapacityLimiter(CONNECTIONS)
    async with anyio.create_task_group() as group:
        while True:
            await room.acquire_on_behalf_of(token := object())
            try:
                await anyio.wait_readable(listener)
                client, _ = listener.accept()       # no await until it is somebody's
            except BlockingIOError:                 # who came has gone again
                room.release_on_behalf_of(token)
                continue
            except OSError as exc:          # no descriptors are left, say; the connection stays in the queue
                log.warning("a connection to a published port has to wait: %s", exc)
                room.release_on_behalf_of(token)
                await asyncio.sleep(0.1)
                continue
            group.start_soon(_connection, client, netns, target, room, token)


async def _connection(
    client: socket.socket, netns: Netns, target: tuple[str, int], room: anyio.CapacityLimiter, token: object
) -> None:
    guest: socket.socket | None = None
    try:
        client.setblocking(False)
        guest = socket_in(netns, family_of(target[0]), socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        guest.setblocking(False)
        for each in (client, guest):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with anyio.fail_after(DIAL):
            await asyncio.get_running_loop().sock_connect(guest, target)
        async with anyio.create_task_group() as group:
            group.start_soon(_copy, client, guest)
            group.start_soon(_copy, guest, client)
    except* (OSError, NetworkError) as failed:
        # One side is gone, or never was: the other one has to see that it wasn't a good end.
        log.debug("a connection to port %d of the guest broke off: %s", target[1], failed.exceptions[0])
        for end in (client, guest):
            if end is not None:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
    finally:
        client.close()
        if guest is not None:
            guest.close()
        room.release_on_behalf_of(token)


async def _copy(source: socket.socket, target: socket.socket) -> None:
    """One direction, to its end, which is passed on: the other direction goes on."""
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(CHUNK))
    while length := await loop.sock_recv_into(source, buffer):
        await loop.sock_sendall(target, buffer[:length])
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
