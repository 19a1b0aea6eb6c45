"""How the host reaches the agent: both ends, or the listening end, of one byte stream."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO

import anyio

from pykata.errors import HostError
from pykata.spec import SerialTransport, Transport, VsockTransport

VHOST_VSOCK = "/dev/vhost-vsock"
SET_GUEST_CID = 0x4008AF60      # _IOW(VHOST_VIRTIO, 0x60, __u64), linux/vhost.h
FIRST_CID = 0x1000              # 0 to 2 mean hypervisor, loopback and host; low numbers are what people type
CIDS = 1 << 31
AHEAD = 1024 * 1024             # bytes that the VMM may write before they are read; the host's kernel may allow less


@contextmanager
def serial() -> Iterator[SerialTransport]:
    """A virtio-serial port: a pair of connected sockets, of which the VMM gets one. There is nothing to dial."""
    try:
        host, vmm = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as exc:
        raise HostError(f"can't open a pair of sockets: {exc.strerror}") from exc
    with host, vmm:
        host.setblocking(False)
        vmm.setblocking(False)
        # Once it was full, such a socket counts as writable when three quarters are read: if it is small, the reader
        # has taken the rest by the time that the VMM has heard of it, and then waits itself.
        vmm.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, AHEAD)
        yield SerialTransport(host=host, vmm=vmm)


def vsock_available() -> bool:
    """Can we give a guest a vsock device?"""
    try:
        os.close(os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC))
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


@contextmanager
def vsock() -> Iterator[VsockTransport]:
    """A listener that the agent dials, and a guest address (CID) that no other guest of this host has."""
    try:
        device = FileIO(VHOST_VSOCK, "r+")
    except OSError as exc:
        raise HostError(f"can't open {VHOST_VSOCK}: {exc.strerror}", hint="modprobe vhost_vsock") from exc
    with device, socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        cid = _reserve_cid(device.fileno())
        listener.setblocking(False)
        listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        listener.listen(1)
        yield VsockTransport(listener=listener, port=listener.getsockname()[1], cid=cid, device=device)


def _reserve_cid(device: int) -> int:
    """Take a free CID. It belongs to the open device, so it is ours before the VMM has even started."""
    while True:
        cid = FIRST_CID + int.from_bytes(os.urandom(8)) % CIDS
        try:
            fcntl.ioctl(device, SET_GUEST_CID, struct.pack("Q", cid))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise HostError(f"{VHOST_VSOCK} refuses a guest's address: {exc.strerror}") from exc
        else:
            return cid


async def connect(transport: Transport) -> socket.socket:
    """The stream to the agent, non-blocking; the caller closes it.

    A serial port is there at once, and what is written to it waits until the guest opens its end. Over vsock this waits
    until the guest dials; whoever else does (every guest of the host can) is turned away. Nobody can dial afterwards:
    what runs in the guest by then has the same address as its agent.
    """
    if isinstance(transport, SerialTransport):
        return transport.host
    while True:
        try:
            # Not the loop's sock_accept: a cancellation that meets its result would lose the stream.
            stream, (cid, _port) = transport.listener.accept()
        except BlockingIOError:
            await anyio.wait_readable(transport.listener)
            continue
        stream.setblocking(False)
        if cid == transport.cid:
            transport.listener.close()
            return stream
        stream.close()
