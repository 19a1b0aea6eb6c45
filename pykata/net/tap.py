"""Taps: interfaces whose other end is a descriptor, which the VMM gets (Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from attrs import frozen

from pykata.errors import NetworkError, NotPermittedError
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, opened_in
from pykata.spec import Nic

TUN = Path("/dev/net/tun")
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000
MOST = 15       # bytes of an interface's name


@frozen
class Tap:
    """A tap, not persistent: it goes when the last descriptor of it is closed, however we end."""

    name: str
    index: int
    fd: int
    netns: Netns

    def nic(self, mac: str) -> Nic:
        """The guest's end."""
        return Nic(self.name, mac, {"type": "tap", "fd": str(self.fd)}, fds=(self.fd,))


def link_name(run_dir: Path, suffix: str) -> str:
    """The name of an interface that belongs to the sandbox with this directory."""
    name = f"pk{run_dir.name}"[: MOST - len(suffix)] + suffix
    if len(suffix) > 3:
        raise NetworkError(f"{name}: {suffix!r} leaves no room for the name of the sandbox")
    return name


@asynccontextmanager
async def tap(
    netns: Netns, name: str, *, mtu: int = 1500, master: int | None = None, vnet_header: bool = True
) -> AsyncIterator[Tap]:
    """A tap in the namespace, switched on; a port of the bridge ``master`` if that is given.

    With ``vnet_header`` the guest leaves checksums and cutting into segments to the host: it says where a checksum
    belongs, and when the frame leaves the host, two bytes there are written over, be they a port or an address. So it
    is off where frames have to be what they look like. Raises NotPermittedError, NetworkError.
    """
    fd = open_tap(netns, name, vnet_header=vnet_header)
    try:
        async with netlink(netns) as kernel:
            link = await kernel.link(name)
            await kernel.change(link.index, mtu=mtu)
            if master is not None:
                await kernel.change(link.index, master=master)
            await kernel.up(link.index)
        yield Tap(name, link.index, fd, netns)
    finally:
        os.close(fd)


def open_tap(netns: Netns, name: str, *, vnet_header: bool = True) -> int:
    """The descriptor of a new tap, switched off. With ``vnet_header`` a virtio_net_hdr precedes each frame.

    Raises NotPermittedError, NetworkError.
    """
    if len(name.encode()) > MOST:
        raise NetworkError(f"{name!r} has more than {MOST} bytes, so it can't be the name of an interface")
    flags = IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL | (IFF_VNET_HDR if vnet_header else 0)
    fd = _open_tun(netns)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as exc:
        os.close(fd)
        if exc.errno in (errno.EPERM, errno.EACCES):
            raise NotPermittedError(f"can't make the tap {name}: {exc.strerror}",
                                    hint="it takes CAP_NET_ADMIN") from exc
        raise NetworkError(f"can't make the tap {name} in {netns.path}: {exc.strerror}") from exc
    return fd


def _open_tun(netns: Netns) -> int:
    try:
        # Where it is opened is where its interface will be.
        return opened_in(netns, TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as exc:
        raise NotPermittedError(f"can't open {TUN}: {exc.strerror}") from exc
    except OSError as exc:
        raise NetworkError(f"can't open {TUN}: {exc.strerror}",
                           hint="load the module 'tun', or give the container the device /dev/net/tun") from exc
