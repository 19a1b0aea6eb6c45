"""An interface of a userspace switch: DPDK's, or Open vSwitch's with DPDK (vhost-user)."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import ClassVar

from attrs import Attribute, field, frozen

from pykata.errors import ConfigError, HostError, NetworkError, NotPermittedError
from pykata.host import short_name
from pykata.net.addresses import checked_addresses, checked_gateway, mac_of
from pykata.net.base import NetworkStrategy, Wanted
from pykata.net.vhost_proxy import passed_on
from pykata.spec import Attachment, Interface, Route, VhostNet

MOST_QUEUES = 8
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


def _path(value: str | Path) -> Path:
    if not isinstance(value, str | Path) or value in ("", Path()):
        raise ConfigError("vhostuser needs the switch's socket", hint='VhostUser("/run/switch/port0", ...)')
    return Path(value)


def _mac(instance: object, attribute: Attribute[str], value: object) -> None:
    if value != "" and (not isinstance(value, str) or not _MAC.fullmatch(value)):
        raise ConfigError(f"mac={value!r} is no address of one interface", hint='such as "02:00:00:00:00:05"')


def _number(least: int, most: int) -> Callable[[object, Attribute[int], object], None]:
    def check(instance: object, attribute: Attribute[int], value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ConfigError(f"{attribute.name}={value!r} is not a number from {least} to {most}")

    return check


@frozen
class VhostUser(NetworkStrategy):
    """A port of a switch that is a program, and moves packets through the guest's memory (vhost-user).

    ::

        Sandbox(network=VhostUser("/run/switch/port0", addresses=["10.0.0.5/24"], gateway="10.0.0.1"))

    The switch listens at ``socket``, and this program connects to it: QEMU needs no right to. It serves one guest
    there, with up to ``queues`` pairs of queues. ``mac`` is made of the first address unless it is given; ``mtu`` 0 is
    1500. ``offload=False`` is for switches that pass a packet on without finishing its checksum, or cutting it up.

    The host's kernel sees none of the packets, so there is no policy, and ports can't be published. The switch can read
    and write all of the guest's memory. If it goes away, the machine is ended, and the error says why.
    """

    name: ClassVar[str] = "vhostuser"

    socket: Path = field(default=Path(), converter=_path)
    addresses: tuple[str, ...] = field(default=(), converter=checked_addresses, kw_only=True)
    gateway: str = field(default="", converter=checked_gateway, kw_only=True)
    mac: str = field(default="", validator=_mac, kw_only=True)
    mtu: int = field(default=0, validator=_number(0, 65535), kw_only=True)
    queues: int = field(default=1, validator=_number(1, MOST_QUEUES), kw_only=True)
    offload: bool = field(default=True, kw_only=True)

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        mac = self.mac or (mac_of(self.addresses[0]) if self.addresses else "02:70:" + os.urandom(4).hex(":"))
        routes = (Route("::/0" if ":" in self.gateway else "0.0.0.0/0", self.gateway),) if self.gateway else ()
        async with AsyncExitStack() as stack:
            switch = stack.enter_context(await _connected(self.socket))
            listener, place = stack.enter_context(_listening(run_dir / "switch.sock"))
            lost = await stack.enter_async_context(passed_on(listener, switch, f"the switch at {self.socket}"))
            yield Attachment(
                devices=(VhostNet("switch", mac, place, queues=self.queues, offload=self.offload),),
                interfaces=(Interface(mac, "eth0", mtu=self.mtu, addresses=self.addresses, routes=routes),),
                lost=(lost,),
            )


async def _connected(path: Path) -> socket.socket:
    """A connection to the switch. Raises HostError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        _check_socket(path)
        with short_name(path.parent) as directory:
            await asyncio.get_running_loop().sock_connect(connection, f"{directory}/{path.name}")
    except OSError as exc:
        connection.close()
        raise _explained(path, exc) from exc
    except BaseException:
        connection.close()
        raise
    return connection


def _check_socket(path: Path) -> None:
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise NetworkError(f"{path} is no socket", hint="name the one at which the switch listens for this port")


def _explained(path: Path, exc: OSError) -> HostError:
    if exc.errno in (errno.EACCES, errno.EPERM):
        return NotPermittedError(f"the switch's socket {path} may not be opened: {exc.strerror}",
                                 hint="connecting takes the right to write to it")
    if exc.errno == errno.ENOENT:
        return NetworkError(f"there is no socket {path}",
                            hint="the switch has to be its server: dpdkvhostuser in Open vSwitch, client=0 in DPDK")
    if exc.errno == errno.ECONNREFUSED:
        return NetworkError(f"no switch listens at {path}", hint="it left its socket behind, or waits for a server")
    return NetworkError(f"no switch can be reached at {path}: {exc.strerror}")


@contextmanager
def _listening(path: Path) -> Iterator[tuple[socket.socket, int]]:
    """Our own socket, and a descriptor of its place: QEMU gets to it by that, though it may not enter its directory."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as listener:
        try:
            with short_name(path.parent) as directory:
                listener.bind(f"{directory}/{path.name}")
            path.chmod(0o666)
            listener.listen(1)
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as exc:
            raise HostError(f"can't make a socket for the switch: {exc}") from exc
        try:
            yield listener, place
        finally:
            os.close(place)
            path.unlink(missing_ok=True)
