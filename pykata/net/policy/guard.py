"""A policy at a tap: owns what is in the kernel for it, and decides about what the kernel asks."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

from attrs import field, frozen

from pykata.host import finish
from pykata.net.policy import dns, resolve
from pykata.net.policy.actions import Guest
from pykata.net.policy.addresses import Address, IPNetwork, is_hosts_own
from pykata.net.policy.connection import Flow
from pykata.net.policy.decide import Judge
from pykata.net.policy.elements import Change, flow_key
from pykata.net.policy.events import Events, Key
from pykata.net.policy.inspector import Inspector
from pykata.net.policy.packets import TCP, Packet
from pykata.net.policy.pins import Pins
from pykata.net.policy.plumbing import Plumbing, plumbed
from pykata.net.policy.rules import Policy
from pykata.net.tap import Tap

log = logging.getLogger(__name__)

BATCH = 64              # frames in a turn of the event loop
MOST_FRAME = 1 << 17
MOST_QUESTIONS = 64     # of DNS at a time; a resolver asks again
GRANTED = {True: 300, False: 60}    # seconds until the kernel forgets a flow that isn't used: TCP, others

RESOLVER = "169.254.53.53"
RESOLVER6 = "fd53::53"
"""Addresses that a guest with a policy has as its name servers if nobody said others. They are nobody's: questions are
answered at the tap."""


@frozen(kw_only=True)
class Guarded:
    """The guest behind a tap.

    ``uplink`` is the interface that frames go on to, or "" where they go where they would go anyway. ``dns`` are the
    guest's name servers, asked from here if ``upstream`` names no others. ``known`` says where those names lead that
    DNS needn't know. ``own`` are addresses and networks of what connects the guest: as the host's own, they are reached
    only if they are named themselves. ``gateways`` are the addresses of those by whom the guest reaches others, and
    ``neighbours`` the MACs that are known, by address: others are learned from what the guest is told.
    """

    run_dir: Path
    mac: str
    addresses: Sequence[str]
    policy: Policy
    uplink: str = ""
    dns: Sequence[str] = ()
    upstream: Sequence[resolve.Server] = ()
    known: Callable[[str], Sequence[str]] = lambda _: ()
    own: Sequence[str] = ()
    gateways: Sequence[str] = ()
    neighbours: Mapping[str, str] = field(factory=dict)


@asynccontextmanager
async def guarded(tap: Tap, about: Guarded, events: Events, pins: Pins) -> AsyncIterator[TapGuard]:
    """Keep the policy at the tap, from before the guest can send anything until the block ends.

    ``events`` and ``pins`` belong to all taps of a sandbox. Raises HostError, NotPermittedError.
    """
    if about.policy.restricts:
        await asyncio.to_thread(resolve.load)
    async with plumbed(tap, about) as pipes:
        guard = TapGuard(pipes, about, events, pins)
        try:
            guard.start()
            yield guard
        finally:
            await finish(guard.close())


class TapGuard:
    """Decides about what comes out of one tap."""

    def __init__(self, pipes: Plumbing, about: Guarded, events: Events, pins: Pins) -> None:
        resolvers = addresses(about.dns or (RESOLVER, RESOLVER6))
        neighbours = {ipaddress.ip_address(each): _mac(mac) for each, mac in about.neighbours.items()}
        guest = Guest(_mac(about.mac), addresses(about.addresses), resolvers, addresses(about.gateways), neighbours)
        self._pipes = pipes
        self._servers = tuple(about.upstream) or tuple((each, 53) for each in about.dns)
        judge = Judge(about.policy, _owning([ipaddress.ip_network(each, strict=False) for each in about.own]))
        self._inspector = Inspector(judge, guest, self, pins, lambda name: addresses(about.known(name)))
        self._events = events
        self._sets: dict[Flow, set[str]] = {}       # the kernel's, in which there is something of a flow
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: asyncio.Event = asyncio.Event()
        self._why = ""

    def change(self, policy: Policy) -> None:
        """Another policy from now on; connections end that it doesn't allow."""
        self._inspector.change(policy)

    async def lost(self) -> str:
        """Wait until the policy can't be kept any more, and say why. The guest is cut off, then."""
        await self._broken.wait()
        return self._why

    # --- frames ---

    def start(self) -> None:
        """Begin to decide."""
        loop = asyncio.get_running_loop()
        for fd, take in ((self._pipes.inspection, self._inspector.from_guest),
                         (self._pipes.copies, self._inspector.to_guest_seen)):
            loop.add_reader(fd, self._read, fd, take)

    def _read(self, fd: int, take: object) -> None:
        assert callable(take)
        for _ in range(BATCH):
            try:
                frame = os.read(fd, MOST_FRAME)
            except BlockingIOError:
                return
            except OSError as exc:
                self._break(fd, f"the policy's device failed: {exc.strerror}")
                return
            try:
                take(frame)
            except Exception:
                # The frame is dropped, and so is whatever else makes us fail: nothing gets out that way.
                log.exception("a frame of a guest could not be judged")
                self._break(fd, "the policy failed")
                return

    def _break(self, fd: int, why: str) -> None:
        asyncio.get_running_loop().remove_reader(fd)
        self._why = self._why or why
        self._broken.set()

    async def close(self) -> None:
        """Stop deciding; what comes after is dropped."""
        for fd in (self._pipes.inspection, self._pipes.copies):
            asyncio.get_running_loop().remove_reader(fd)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --- what the inspector has done ---

    def to_guest(self, frame: bytes) -> None:
        with suppress(OSError):         # its queue is full, or it is gone: as on any network, the frame is lost
            self._pipes.guest.send(frame)

    def onward(self, frame: bytes) -> None:
        with suppress(OSError):
            self._pipes.onward.send(frame)

    def grant(self, flow: Flow) -> None:
        self._add(flow, "flows", GRANTED[flow.protocol == TCP])

    def read(self, flow: Flow) -> None:
        self._add(flow, "read")

    def read_on(self, flow: Flow) -> None:
        self._add(flow, "data")

    def catch_up(self) -> None:
        self._read(self._pipes.copies, self._inspector.to_guest_seen)

    def _add(self, flow: Flow, kind: str, timeout: int = 0) -> None:
        self._sets.setdefault(flow, set()).add(kind)
        change = Change("add", f"{kind}{flow.version}", _key(flow), timeout)
        for error in self._pipes.elements.change([change]):
            if error:
                log.warning("can't add to the set %s: %s", change.set, os.strerror(error))

    def forget(self, flow: Flow) -> None:
        kinds = self._sets.pop(flow, set())
        self._pipes.elements.change([Change("delete", f"{kind}{flow.version}", _key(flow)) for kind in kinds])

    def cut(self, flow: Flow) -> None:
        self.forget(flow)
        self._pipes.elements.change([Change("delete", f"replies{flow.version}", _key(flow))])

    def admit(self, mac: bytes, address: Address | None) -> None:
        self._elements("add", mac, address)

    def dismiss(self, mac: bytes, address: Address | None) -> None:
        self._elements("delete", mac, address)

    def _elements(self, verb: Literal["add", "delete"], mac: bytes, address: Address | None) -> None:
        # A part of a key takes whole registers of 4 bytes.
        where, key = ("routers", mac) if address is None else (f"near{address.version}", address.packed + mac + b"\0\0")
        for error in self._pipes.elements.change([Change(verb, where, key)]):
            if error and verb == "add":
                log.warning("can't add to the set %s: %s", where, os.strerror(error))

    def ask(self, question: dns.Question, packet: Packet) -> None:
        if len(self._tasks) >= MOST_QUESTIONS:
            return
        task = asyncio.get_running_loop().create_task(self._ask(question, packet))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, question: dns.Question, packet: Packet) -> None:
        answer = await resolve.resolve(dns.query(question), self._servers)
        try:
            self._inspector.answered(question, packet, answer)
        except Exception:
            log.exception("an answer of DNS could not be judged")

    def tell(
        self, action: Literal["allowed", "denied"], reason: str, why: str, protocol: str, address: str, port: int,
        name: str,
    ) -> None:  # fmt: skip
        self._events.tell(Key(action, reason, why, protocol, address, port, name))


def addresses(texts: Sequence[str]) -> tuple[Address, ...]:
    """Addresses, without the lengths of prefixes that they may have."""
    return tuple(ipaddress.ip_address(text.partition("/")[0]) for text in texts)


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _owning(networks: Sequence[IPNetwork]) -> Callable[[Address], bool]:
    return lambda address: is_hosts_own(address) or any(
        address.version == each.version and address in each for each in networks
    )


def _key(flow: Flow) -> bytes:
    return flow_key(flow.protocol, flow.source, flow.destination, flow.dport, flow.sport)
