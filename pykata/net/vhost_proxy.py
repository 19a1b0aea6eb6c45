"""Messages of vhost-user with their descriptors, passed on between QEMU and a switch (QEMU, interop/vhost-user.rst).

QEMU wants to connect to the switch itself, by a path, and refuses a connection that it is handed; but its user may open
nothing. So it connects to us. Only what sets the queues up comes this way: packets move through the guest's memory.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import anyio

from pykata.host import finish

HEADER = struct.Struct("=III")      # request, flags, bytes of payload
LONGEST = 4096                      # bytes of payload; the longest message of the protocol has some 550
MOST_DESCRIPTORS = 32


class _FaultError(Exception):
    """What came is no message of the protocol."""


@asynccontextmanager
async def passed_on(
    listener: socket.socket, switch: socket.socket, name: str
) -> AsyncIterator[Callable[[], Awaitable[str]]]:
    """Accept QEMU's one connection, and pass on what is said, while the block runs.

    Yields what waits until the switch has left, and says so.
    """
    left: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(_serve(listener, switch, name, left))

    async def lost() -> str:
        return await asyncio.shield(left)

    try:
        yield lost
    finally:
        task.cancel()
        await finish(_over(task))
        left.cancel()


async def _over(task: asyncio.Future[None]) -> None:
    await asyncio.wait({task})


async def _serve(listener: socket.socket, switch: socket.socket, name: str, left: asyncio.Future[str]) -> None:
    vmm, _ = await asyncio.get_running_loop().sock_accept(listener)
    listener.close()            # once is enough: who comes later is told at once
    with vmm:
        vmm.setblocking(False)
        async with anyio.create_task_group() as group:

            async def pass_all(source: socket.socket, target: socket.socket, why: str) -> None:
                try:
                    while await _pass(source, target):
                        pass
                except _FaultError as exc:
                    why = f"{name} broke the protocol: {exc}" if source is switch else ""
                except OSError as exc:
                    why = why and f"the connection to {name} broke off: {exc.strerror}"
                if why and not left.done():
                    left.set_result(why)
                group.cancel_scope.cancel()

            group.start_soon(pass_all, switch, vmm, f"{name} closed its connection")
            group.start_soon(pass_all, vmm, switch, "")
        with suppress(OSError):
            switch.shutdown(socket.SHUT_RDWR)       # it is told as soon as the VMM has left


async def _pass(source: socket.socket, target: socket.socket) -> bool:
    """One message; False at the end. Raises OSError, _FaultError."""
    descriptors: list[int] = []
    try:
        head = await _received(source, HEADER.size, descriptors)
        if not head:
            return False
        if len(head) < HEADER.size:
            raise _FaultError("half a message")
        size = HEADER.unpack(head)[2]
        if size > LONGEST:
            raise _FaultError(f"a message of {size} bytes")
        message = head + await _received(source, size, descriptors)
        if len(message) < HEADER.size + size:
            raise _FaultError("half a message")
        await _send(target, message, descriptors)
        return True
    finally:
        for each in descriptors:
            os.close(each)


async def _received(source: socket.socket, size: int, descriptors: list[int]) -> bytes:
    """So many bytes, or fewer at the end; what came with them is put to the ``descriptors``."""
    data = b""
    while len(data) < size:
        await anyio.wait_readable(source)
        try:
            piece, given, flags, _ = socket.recv_fds(
                source, size - len(data), MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        descriptors += given
        if flags & socket.MSG_CTRUNC:
            raise _FaultError("too many descriptors")
        if not piece:
            break
        data += piece
    return data


async def _send(target: socket.socket, message: bytes, descriptors: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    while True:
        with suppress(BlockingIOError):
            sent = target.sendmsg([message], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            break
        await anyio.wait_writable(target)
    if sent < len(message):
        await asyncio.get_running_loop().sock_sendall(target, message[sent:])
