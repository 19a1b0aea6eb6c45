"""A sandbox's network as its caller asks for it: a strategy, and what goes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import field, frozen

from pykata.errors import ConfigError
from pykata.net.base import NetworkStrategy, Wanted
from pykata.net.names import check_hosts, check_search, check_servers
from pykata.net.policy.rules import Policy, Rate, policy_of
from pykata.net.ports import Ports, parse_ports
from pykata.spec import Port


def _listed(value: Sequence[str] | None) -> Sequence[str] | None:
    # A lone string stays one: to be refused, rather than taken for a list of its letters.
    return value if value is None or isinstance(value, str) else tuple(value)


@frozen
class Network:
    """How a sandbox is connected, and what its guest may reach.

    ::

        Sandbox(network=Network("user", ports={8080: 80}, hosts={"db": "10.0.0.5"}))
        Sandbox(network=Network(allow=["pypi.org", "10.0.0.0/8:443"]))

    ``strategy`` is a value (``UserNetwork()``) or a name. With ``allow``, the guest reaches only what is named there
    (domains, addresses, ports); ``deny`` wins over it; ``rate`` limits how much it sends and receives. ``ports`` of the
    host lead to ports of the guest: ``{8080: 80}``, ``{("127.0.0.1", 0): "53/udp"}``, or a list of :class:`Port` and of
    text such as ``"8080:80/udp"``. They are on 127.0.0.1 unless told otherwise, and port 0 is any free one, which
    ``sb.network.ports`` tells. ``dns`` are the addresses of the name servers in each container's resolv.conf,
    ``search`` its search domains, ``hosts`` names for its /etc/hosts.

    Raises :class:`ConfigError` for what can't be right, or what the strategy can't do.
    """

    strategy: NetworkStrategy | str = "user"
    allow: Sequence[str] | None = field(default=None, kw_only=True, converter=_listed)
    deny: Sequence[str] = field(default=(), kw_only=True, converter=_listed)
    rate: Rate | None = field(default=None, kw_only=True)
    ports: tuple[Port, ...] = field(default=(), kw_only=True, converter=parse_ports)
    dns: tuple[str, ...] = field(default=(), kw_only=True, converter=check_servers)
    search: tuple[str, ...] = field(default=(), kw_only=True, converter=check_search)
    hosts: Mapping[str, str] = field(factory=dict, kw_only=True, converter=check_hosts)
    policy: Policy | None = field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "policy", policy_of(self.allow, self.deny or (), self.rate))

    @property
    def wanted(self) -> Wanted:
        """What the strategy is told."""
        return Wanted(policy=self.policy, ports=self.ports, dns=self.dns, hosts=self.hosts)

    def check(self, strategy: NetworkStrategy, others: Mapping[str, type[NetworkStrategy]]) -> None:
        """Raise ConfigError for what this strategy can't do; ``others`` are those to be named."""
        name = getattr(strategy, "name", type(strategy).__name__)

        def refuse(what: str, able: list[str]) -> None:
            raise ConfigError(f"network {name!r} can't {what}", hint=f"these can: {', '.join(able)}" if able else "")

        if self.ports and not strategy.publishes:
            refuse("publish ports", [each for each, kind in others.items() if kind.publishes])
        if name == "none" and (self.dns or self.search):
            raise ConfigError("network 'none' has no use for dns and search", hint="hosts= works without a network")
        if self.policy is not None and not strategy.enforces:
            refuse("enforce allow, deny or rate", [each for each, kind in others.items() if kind.enforces])


__all__ = ["Network", "Ports"]
