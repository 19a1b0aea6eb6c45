"""The policy of one sandbox, at all of its taps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from attrs import field, frozen

from pykata.errors import ConfigError
from pykata.net.base import Wanted
from pykata.net.policy.events import Events
from pykata.net.policy.guard import RESOLVER, RESOLVER6, Guarded, TapGuard, addresses, guarded
from pykata.net.policy.pins import Pins
from pykata.net.policy.resolve import Server
from pykata.net.policy.rules import Policy
from pykata.net.tap import Tap
from pykata.spec import Attachment, NetworkEvent


@frozen
class Tapped:
    """A tap, and who is behind it. ``uplink`` is an interface of the tap's namespace: what comes in at one of the two
    goes out of the other, as far as the policy lets it, and nothing else may redirect either, for tc would do so before
    nftables sees it. Without, frames go where they would go anyway: the tap is a port of a bridge, or they are routed.
    ``own`` are addresses and networks of what connects the guest: gateways, their name servers. ``gateways`` are those
    of the guest's routes, ``neighbours`` known MACs, by address (:class:`~pykata.net.policy.stations.Stations`).
    """

    tap: Tap
    mac: str
    addresses: Sequence[str]
    uplink: str = ""
    own: Sequence[str] = ()
    gateways: Sequence[str] = ()
    neighbours: Mapping[str, str] = field(factory=dict)


@asynccontextmanager
async def enforced(
    run_dir: Path, taps: Sequence[Tapped], wanted: Wanted, *, known: Callable[[str], Sequence[str]] = lambda _: (),
    upstream: Sequence[Server] = (),
) -> AsyncIterator[Attachment]:  # fmt: skip
    """Keep the policy that is wanted, if one is, at all taps of a sandbox; enter it before the guest can send.

    Yields the guard, the guest's name servers, and what says that the policy can't be kept any more: without a policy,
    nothing. ``known`` says where names lead that DNS needn't know, as far as they are allowed. Others are asked of
    ``upstream``, of ``wanted.dns``, or of the host's name servers. Raises HostError, NotPermittedError.
    """
    policy = wanted.policy
    if policy is None:
        yield Attachment()
        return
    events = Events()
    pins = Pins({name: addresses([address]) for name, address in wanted.hosts.items()})
    async with AsyncExitStack() as stack:
        stack.callback(events.close)
        guards = [
            await stack.enter_async_context(guarded(each.tap, Guarded(
                run_dir=run_dir, mac=each.mac, addresses=each.addresses, policy=policy, uplink=each.uplink,
                dns=wanted.dns, upstream=upstream, known=known, own=each.own,
                gateways=each.gateways, neighbours=each.neighbours,
            ), events, pins)) for each in taps
        ]  # fmt: skip
        yield Attachment(
            nameservers=_name_servers(taps, wanted) if policy.restricts else (),
            guards=(Policing(policy, guards, events),), lost=tuple(guard.lost for guard in guards),
        )  # fmt: skip


def _name_servers(taps: Sequence[Tapped], wanted: Wanted) -> tuple[str, ...]:
    if wanted.dns:
        return wanted.dns
    versions = {each.version for one in taps for each in addresses(one.addresses)}
    return (RESOLVER,) if 4 in versions else (RESOLVER6,)


class Policing:
    """What a running sandbox changes and listens to; a :class:`~pykata.spec.Guard`."""

    def __init__(self, policy: Policy, guards: Sequence[TapGuard], events: Events) -> None:
        self._policy = policy
        self._guards = guards
        self._events = events

    @property
    def remembered(self) -> int:
        """How many events who begins to read now gets at once."""
        return self._events.remembered

    def events(self) -> AsyncIterator[NetworkEvent]:
        """What was denied and allowed: the last of what was, then what comes, until the sandbox ends."""
        return self._events.read()

    async def allow(self, *rules: str) -> None:
        """Let the guest reach more, from now on. Raises ConfigError."""
        self._change(self._policy.with_allowed(rules))

    async def deny(self, *rules: str) -> None:
        """Let the guest reach less, from now on; connections end that aren't allowed any more. Raises ConfigError."""
        self._change(self._policy.with_denied(rules))

    def _change(self, policy: Policy) -> None:
        if not self._policy.restricts:
            raise ConfigError("this sandbox's network only has a rate", hint="Network(deny=[...]) can be changed")
        self._policy = policy
        for guard in self._guards:
            guard.change(policy)
