"""From the name of a hypervisor, filesystem or network to its value."""

from __future__ import annotations

from importlib import import_module
from typing import TypeVar

from attrs import evolve

from pykata.errors import ConfigError, UnknownStrategyError
from pykata.net.base import NetworkStrategy
from pykata.net.network import Network

T = TypeVar("T")

NETWORKS = "pykata.networks"

# Our own are named here as well as looked up: scanning every installed distribution's metadata costs several
# milliseconds at each start, and a checkout that isn't installed has no metadata at all.
OURS = {
    "pykata.hypervisors": {"qemu": "pykata.hypervisors.qemu:QEMU"},
    "pykata.filesystems": {
        "block": "pykata.fs.block:Block", "virtiofs": "pykata.fs.virtiofs:VirtioFS", "9p": "pykata.fs.ninep:NineP",
    },
    "pykata.networks": {
        "bridge": "pykata.net.bridge:Bridge",
        "cni": "pykata.net.cni:CNI",
        "macvtap": "pykata.net.macvtap:MacVTap",
        "none": "pykata.net.none:NoNetwork",
        "tcfilter": "pykata.net.tcfilter:TCFilter",
        "user": "pykata.net.user:UserNetwork",
        "vhostuser": "pykata.net.vhost_user:VhostUser",
    },
}


def strategy(kind: type[T], group: str, choice: T | str) -> T:
    """The strategy that ``choice`` is, or names in the entry points of ``group``.

    Raises :class:`UnknownStrategyError` that lists the known names, :class:`ConfigError` for anything else.
    """
    if isinstance(choice, kind):
        return choice
    what = group.removeprefix("pykata.").removesuffix("s")
    if not isinstance(choice, str):
        raise ConfigError(f"{what}={choice!r} is neither a {kind.__name__} nor the name of one")
    made = _load(group, choice, what)()
    if not isinstance(made, kind):
        raise ConfigError(f"{what} {choice!r} is registered as {made!r}, which is no {kind.__name__}")
    return made


def _load(group: str, name: str, what: str) -> type:
    ours = OURS.get(group, {})
    if name in ours:
        module, _, attribute = ours[name].partition(":")
        return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
    from importlib.metadata import entry_points  # costs 10 ms, and only other people's strategies need it

    found = {point.name: point for point in entry_points(group=group)}
    if name not in found:
        known = ", ".join(sorted({*ours, *found}))
        raise UnknownStrategyError(f"there is no {what} named {name!r}", hint=f"known: {known}")
    try:
        return found[name].load()  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what} {name!r} is installed, but can't be imported: {error}") from error


def network(choice: object) -> Network:
    """A network by the name of a strategy, as a strategy or as a whole; checked, and its strategy a value.

    Raises :class:`UnknownStrategyError`, :class:`ConfigError`.
    """
    asked = choice if isinstance(choice, Network) else Network(choice)  # type: ignore[arg-type]
    found = strategy(NetworkStrategy, NETWORKS, asked.strategy)  # type: ignore[type-abstract]
    if asked.ports or asked.policy is not None or asked.dns or asked.search:
        asked.check(found, {name: _load(NETWORKS, name, "network") for name in OURS[NETWORKS]})
    return evolve(asked, strategy=found)
