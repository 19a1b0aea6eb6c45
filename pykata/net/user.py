"""User-mode networking: the guest's connections are made by a program of the host's, without privileges."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import ClassVar, Literal, get_args

from attrs import Attribute, field, frozen

from pykata import host
from pykata.errors import ConfigError, NetworkError, ToolMissingError, ToolTooOldError
from pykata.net import netns as namespaces
from pykata.net.base import NetworkStrategy, Wanted
from pykata.net.netlink import Link, Netlink, netlink
from pykata.net.netns import Netns, socket_in
from pykata.net.policy.packets import ICMP6, checksum, pseudo
from pykata.net.relay import Listener, bound, relayed
from pykata.net.rootless import NoNamespaceError, rootless
from pykata.net.tap import TUN, Tap, tap
from pykata.net.user_qemu import by_qemu, lacking
from pykata.spec import Attachment, Interface, Route

Via = Literal["auto", "passt", "slirp4netns", "qemu"]

# The guest's side of the namespace, and the side that leads out. slirp4netns knows no other IPv6 than fd00::/64.
GATEWAY, GUEST, BITS = "10.0.2.2", "10.0.2.15", 24
GATEWAY6, GUEST6, BITS6 = "fd00:0:0:2::2", "fd00:0:0:2::15", 64
OURS, OUT, DNS = "10.0.3.1", "10.0.3.2", "10.0.3.3"
OURS6, OUT6 = "fd00::1", "fd00::2"
OWN = (GATEWAY, GATEWAY6, f"{OUT}/{BITS}", f"{OUT6}/{BITS6}")
UPLINK, TAP = "up0", "guest0"

OLDEST_PASST = "20240101"

MTU = 65520
"""Both programs take the largest packets there are, and each costs the same."""

METADATA = ("169.254.0.0/16", "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32", "fd00:ec2::254/128")
"""Where clouds tell a machine its secrets."""


log = logging.getLogger(__name__)


class NoTunError(NetworkError):
    """There is no /dev/net/tun for this user."""


@frozen
class Program:
    """What makes the guest's connections, whatever its file is called."""

    name: Literal["slirp4netns", "pasta"]
    path: Path


def _via(instance: object, attribute: Attribute[str], value: object) -> None:
    if value not in (choices := get_args(Via)):
        raise ConfigError(f"via={value!r} is unknown", hint=f"choose one of {', '.join(map(repr, choices))}")


@frozen
class UserNetwork(NetworkStrategy):
    """Outbound connections without privileges: TCP, UDP and ping, over IPv4 and IPv6.

    ::

        Sandbox(network=Network(UserNetwork(), ports={8080: 80}))

    The guest is behind a network namespace of its own, in which a program of the host's makes the guest's connections
    as if they were its own: ``via`` is ``"slirp4netns"`` or ``"passt"`` (as pasta), or ``"auto"`` for the first of them
    that is installed. ``"qemu"`` is QEMU's own networking, which takes neither a program nor a namespace, and is what
    ``"auto"`` comes to where those are missing or forbidden: IPv4 alone, no policy, only ports of TCP.
    ``sb.network.via`` tells which it is.

    The guest can't reach the host's loopback, the host's own addresses and the metadata services of clouds, unless
    ``host=True``: then the host's loopback is 10.0.3.2, too (via QEMU 10.0.2.2), which is called ``host.internal`` in
    the containers. ``ipv6=None`` is for where the host itself has a way to the IPv6 internet.
    """

    via: Via = field(default="auto", validator=_via)
    host: bool = False
    ipv6: bool | None = None

    name: ClassVar[str] = "user"
    publishes: ClassVar[bool] = True
    enforces: ClassVar[bool] = True

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        outside = await _outside()
        async with AsyncExitStack() as stack:
            if self.via == "qemu":
                made = await stack.enter_async_context(self._by_qemu(wanted, outside))
            else:
                with ExitStack() as taken:
                    listeners = taken.enter_context(bound(wanted.ports))
                    try:
                        made = await stack.enter_async_context(self._by_program(run_dir, wanted, outside, listeners))
                        stack.push(taken.pop_all())
                    except (ToolMissingError, ToolTooOldError, NoNamespaceError, NoTunError) as exc:
                        if self.via != "auto" or lacking(wanted, ipv6=bool(self.ipv6)):
                            raise
                        log.info("user-mode networking is left to QEMU: %s", exc)
                        taken.close()
                        made = await stack.enter_async_context(self._by_qemu(wanted, outside))
            yield made

    @asynccontextmanager
    async def _by_qemu(self, wanted: Wanted, outside: _Outside) -> AsyncIterator[Attachment]:
        if what := lacking(wanted, ipv6=bool(self.ipv6)):
            raise ConfigError(f"network 'user' with via='qemu' can't {what}", hint="slirp4netns and passt can")
        refused = (*METADATA, *outside.addresses)
        async with by_qemu(wanted, _new_mac(), refused, to_host=self.host) as made:
            yield made

    @asynccontextmanager
    async def _by_program(
        self, run_dir: Path, wanted: Wanted, outside: _Outside, listeners: Sequence[Listener]
    ) -> AsyncIterator[Attachment]:
        async with AsyncExitStack() as stack:
            ipv6 = outside.ipv6 if self.ipv6 is None else self.ipv6
            if not os.access(TUN, os.R_OK | os.W_OK):
                raise NoTunError(f"user-mode networking doesn't work here: {TUN} can't be opened",
                                 hint="load the module 'tun', or give the container the device /dev/net/tun")
            program = await self.program()
            command = self._command(program, ipv6=ipv6)
            made, words = await stack.enter_async_context(rootless(program.name, command, UPLINK))
            inside = await stack.enter_async_context(tap(made, TAP, mtu=MTU, vnet_header=not wanted.restricts))
            interface = _interface(_new_mac(), ipv6=ipv6)
            guarding = await stack.enter_async_context(_guarded(run_dir, inside, interface, wanted))
            # A policy refuses them itself, unless they are what it allows.
            free = self.host or wanted.restricts
            async with netlink(made) as kernel:
                refused = () if free else (*METADATA, *outside.addresses)
                await self._connect(kernel, inside.index, refused, ipv6=ipv6)
                announce(made, await kernel.link(UPLINK))
            published = await stack.enter_async_context(relayed(listeners, made, [GUEST]))
            yield guarding + Attachment(
                devices=(inside.nic(interface.mac),), interfaces=(interface,),
                nameservers=() if guarding.nameservers else (DNS,),
                hosts=(("host.internal", OUT),) if self.host else (), published=published, lost=(words.ended,),
                via=("passt" if program.name == "pasta" else program.name,),
            )  # fmt: skip

    async def program(self) -> Program:
        """The program that makes the connections. Raises ToolMissingError, ToolTooOldError."""
        if self.via == "passt":
            return await _passt()
        try:
            return _slirp()
        except ToolMissingError:
            if self.via == "slirp4netns":
                raise
        try:
            return await _passt()
        except ToolMissingError:
            raise ToolMissingError("neither slirp4netns nor passt is installed",
                                   hint="apt-get install slirp4netns") from None

    def _command(self, program: Program, *, ipv6: bool) -> list[str | Path]:
        if program.name == "slirp4netns":
            return [
                program.path, "--netns-type=path", f"--cidr={OUT.rpartition('.')[0]}.0/{BITS}", f"--mtu={MTU}",
                "--enable-sandbox", "--enable-seccomp",
                *(["--enable-ipv6"] if ipv6 else []),
                *([] if self.host else ["--disable-host-loopback"]),
                "@/ns/net", UPLINK,
            ]  # fmt: skip
        return [
            program.path, "--foreground", "--quiet", "--netns-only", "--netns", "@/ns/net", "-I", UPLINK,
            "-a", GUEST, "-n", str(BITS), "-g", OUT, "--dns-forward", DNS, "--mtu", str(MTU),
            *(["-a", GUEST6, "-g", OUT6] if ipv6 else ["--ipv4-only"]),
            # By default each port that listens on one side is connected to the other.
            "-t", "none", "-u", "none", "-T", "none", "-U", "none",
            "--no-dhcp", "--no-dhcpv6", "--no-ra",
            *([] if self.host else ["--no-map-gw"]),
        ]  # fmt: skip

    async def _connect(self, kernel: Netlink, inside: int, refused: Sequence[str], *, ipv6: bool) -> None:
        """Addresses and routes of the namespace: from the guest to the program, but not to what is ``refused``."""
        uplink = await kernel.link(UPLINK)
        for index, address in ((inside, f"{GATEWAY}/{BITS}"), (uplink.index, f"{OURS}/{BITS}")):
            await kernel.add_address(index, address)
        if ipv6:
            for index, address in ((inside, f"{GATEWAY6}/{BITS6}"), (uplink.index, f"{OURS6}/{BITS6}")):
                await kernel.add_address(index, address)
        await kernel.up(uplink.index)
        await kernel.add_route(dst="0.0.0.0/0", gateway=OUT, oif=uplink.index)
        if ipv6:
            await kernel.add_route(dst="::/0", gateway=OUT6, oif=uplink.index)
        for each in refused:
            if ipv6 or ":" not in each:
                # The guest is told at once that it may not.
                await kernel.add_route(dst=each, type="prohibit")


@asynccontextmanager
async def _guarded(run_dir: Path, tap: Tap, interface: Interface, wanted: Wanted) -> AsyncIterator[Attachment]:
    """The policy that is wanted, if one is, at the guest's tap."""
    if wanted.policy is None:
        yield Attachment()
        return
    from pykata.net.policy.enforce import Tapped, enforced  # takes a while, and few come here

    tapped = Tapped(tap, interface.mac, interface.addresses, own=OWN, gateways=(GATEWAY, GATEWAY6))
    async with enforced(run_dir, [tapped], wanted) as attachment:
        yield attachment


@frozen
class _Outside:
    """What is to be known of the host's own network."""

    addresses: tuple[str, ...]
    ipv6: bool


async def _outside() -> _Outside:
    with namespaces.opened() as ours:
        async with netlink(ours) as kernel:
            addresses = [each for link in await kernel.links() for each in await kernel.addresses(link.index)]
            routes = await kernel.routes()
    own = [ipaddress.ip_interface(each).ip for each in addresses]
    return _Outside(
        tuple(f"{each}/{each.max_prefixlen}" for each in own if not each.is_loopback),
        any(each.destination == "::/0" for each in routes),
    )


def announce(netns: Netns, uplink: Link) -> None:
    """Say on the uplink that the guest's addresses are to be found here: the other end can't ask, for they're beyond.

    A gratuitous ARP request (RFC 5227) and an unsolicited neighbour advertisement (RFC 4861, 7.2.6).
    """
    mac = bytes.fromhex(uplink.mac.replace(":", ""))
    guest, guest6, everyone = (ipaddress.ip_address(each) for each in (GUEST, GUEST6, "ff02::1"))
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac + guest.packed + bytes(6) + guest.packed
    advertisement = struct.pack("!BBHI", 136, 0, 0, 0x2000_0000) + guest6.packed + b"\x02\x01" + mac
    summed = checksum(pseudo(guest6, everyone, ICMP6, len(advertisement)) + advertisement)
    advertisement = advertisement[:2] + struct.pack("!H", summed) + advertisement[4:]
    header = struct.pack("!IHBB", 6 << 28, len(advertisement), ICMP6, 255)
    packet = header + guest6.packed + everyone.packed + advertisement
    with socket_in(netns, socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as wire:
        wire.bind((uplink.name, 0))
        wire.send(b"\xff" * 6 + mac + b"\x08\x06" + arp)
        wire.send(b"\x33\x33\0\0\0\x01" + mac + b"\x86\xdd" + packet)


def _interface(mac: str, *, ipv6: bool) -> Interface:
    addresses = (f"{GUEST}/{BITS}", *((f"{GUEST6}/{BITS6}",) if ipv6 else ()))
    routes = (Route("0.0.0.0/0", GATEWAY), *((Route("::/0", GATEWAY6),) if ipv6 else ()))
    return Interface(mac, "eth0", mtu=MTU, addresses=addresses, routes=routes)


def _new_mac() -> str:
    """One of those that nobody was given."""
    return "52:54:00:" + os.urandom(3).hex(":")


def _slirp() -> Program:
    return Program("slirp4netns", host.find_tool("slirp4netns", package="slirp4netns", env_var="PYKATA_SLIRP4NETNS"))


async def _passt() -> Program:
    """With the name of passt's other half it speaks to a network namespace rather than to QEMU."""
    program = host.find_tool("pasta", package="passt", env_var="PYKATA_PASTA")
    # Debian 13's ends without writing out what it has for a pipe.
    argv: list[str | Path] = [host.find_tool("stdbuf", package="coreutils"), "-o0", program, "--version"]
    said = (await host.run_tool(argv, timeout=10)).decode(errors="replace")
    dated = re.search(r"20[0-9]{6}|20[0-9]{2}_[0-9]{2}_[0-9]{2}", said)
    # Debian 12's doesn't know its version, and its connections stop after some kilobytes.
    if dated is None or dated[0].replace("_", "") < OLDEST_PASST:
        raise ToolTooOldError(f"{program} is too old: {said.splitlines()[0] if said else 'no version'}",
                              hint=f"it takes one of {OLDEST_PASST} or later, or slirp4netns")
    return Program("pasta", program)
