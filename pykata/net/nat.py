"""Rules of nftables for a network that pykata owns: who gets out of it, and as whom."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from pykata.errors import NetworkError, ToolFailedError
from pykata.host import find_tool, locked, run_tool
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, opened

SYSCTL = Path("/proc/sys/net/ipv4")


class Translated(Protocol):
    """The part of a network's plan that its rules are about."""

    @property
    def subnet(self) -> str: ...
    @property
    def subnet6(self) -> str: ...
    @property
    def host(self) -> bool: ...
    @property
    def link(self) -> str: ...
    @property
    def connections(self) -> int: ...


ALL = 16
"""Guests whose connections a network may have at a time: they can use addresses of each other's."""


def inner(plan: Translated) -> str:
    """In the network's namespace: ports that are cut off from each other aren't to meet at the gateway."""
    return """
table inet pykata {
    chain forward {
        type filter hook forward priority 0; policy accept;
        iifname "bridge" oifname "bridge" drop
    }
}
"""


def outer(plan: Translated) -> str:
    """On the host: out with the host's address, in only with what belongs to that, and nothing to the host itself.

    The host remembers each connection, in a table that all have together. What is over the limit is told so at once.
    """
    link, six = plan.link, plan.subnet6
    to_host = f"""
    chain input {{
        type filter hook input priority 0; policy accept;
        iifname "{link}" ct state new jump begun
    }}""" if plan.host else f"""
    chain input {{
        type filter hook input priority 0; policy accept;
        iifname "{link}" ct state established,related accept
        iifname "{link}" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        iifname "{link}" reject with icmpx type admin-prohibited
    }}"""
    masquerade6 = f'ip6 saddr {six} oifname != "{link}" masquerade' if six else ""
    not_theirs6 = f"ip6 saddr != {six}" if six else "meta nfproto ipv6"
    no_more = "counter reject with icmpx type admin-prohibited"
    return f"""
table inet {table(plan)} {{
    set connections4 {{ type ipv4_addr; size 65535; flags dynamic; }}
    set connections6 {{ type ipv6_addr; size 65535; flags dynamic; }}
    chain begun {{
        add @connections4 {{ ip saddr ct count over {plan.connections} }} {no_more}
        add @connections6 {{ ip6 saddr ct count over {plan.connections} }} {no_more}
        ct count over {plan.connections * ALL} {no_more}
    }}
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
        ip saddr {plan.subnet} oifname != "{link}" masquerade
        {masquerade6}
    }}
    chain forward {{
        type filter hook forward priority 0; policy accept;
        iifname "{link}" ip daddr 169.254.0.0/16 reject with icmpx type admin-prohibited
        iifname "{link}" ip saddr != {plan.subnet} drop
        iifname "{link}" {not_theirs6} drop
        iifname "{link}" ct state new jump begun
        oifname "{link}" ct state established,related accept
        oifname "{link}" drop
    }}{to_host}
}}
"""


def table(plan: Translated) -> str:
    """The name of its table, by which it is found."""
    return f"pykata-{plan.link}"


async def load_inner(netns: Netns, plan: Translated) -> None:
    """Raises NetworkError."""
    await _nft(netns, inner(plan))


async def load_outer(plan: Translated, place: Path) -> None:
    """Switch it on; ``place`` is the directory of all networks. Raises NetworkError."""
    with opened() as ours:
        await _nft(ours, outer(plan))
    async with locked(place / ".forwarding.lock"):
        await _forward(plan, place / ".forwarding")


async def unload_outer(plan: Translated, place: Path) -> None:
    """Take the rules away; with the last network, the host forwards no more than it did before. Raises NetworkError."""
    with opened() as ours:
        # "add" makes it succeed where there is none.
        await _nft(ours, f"add table inet {table(plan)}\ndelete table inet {table(plan)}\n")
    async with locked(place / ".forwarding.lock"):
        if _links(place) <= {plan.link}:
            _restore(place / ".forwarding")


def _links(place: Path) -> set[str]:
    return {json.loads(each.read_text())["link"] for each in place.glob("*/network.json")}


async def _nft(netns: Netns, rules: str) -> None:
    nft, nsenter = find_tool("nft", package="nftables"), find_tool("nsenter", package="util-linux")
    try:
        await run_tool([nsenter, f"--net={netns.proc_path}", nft, "-f", "-"], input=rules.encode(), timeout=30)
    except ToolFailedError as exc:
        raise NetworkError(f"this kernel doesn't take the rules of a network: {exc}",
                           hint="it needs nf_tables with the family inet, nat, reject and connlimit") from exc


async def _forward(plan: Translated, record: Path) -> None:
    """Have the host pass on packets from the network and back: from these interfaces only, if it doesn't anyway."""
    if _forwards_anyway():
        return
    with opened() as ours:
        async with netlink(ours) as kernel:
            ways = {each.raw["oif"] for each in await kernel.routes() if each.destination.endswith("/0")}
            names = [each.name for each in await kernel.links() if each.index in ways]
    _switch_on(plan.link, names, record)


def _switch_on(link: str, names: list[str], record: Path) -> None:
    switched = [each for each in names if (SYSCTL / "conf" / each / "forwarding").read_text().strip() == "0"]
    if switched:
        record.write_text("\n".join(switched))
    for name in (link, *switched):
        try:
            (SYSCTL / "conf" / name / "forwarding").write_text("1")
        except OSError as exc:
            raise NetworkError(f"can't have the host forward packets of {name}: {exc.strerror}",
                               hint="sysctl net.ipv4.ip_forward=1 does") from exc


def _restore(record: Path) -> None:
    with suppress(FileNotFoundError):
        for name in record.read_text().splitlines():
            # Whoever switched it on for all interfaces meanwhile needs it.
            if not _forwards_anyway():
                with suppress(OSError):
                    (SYSCTL / "conf" / name / "forwarding").write_text("0")
        record.unlink()


def _forwards_anyway() -> bool:
    return (SYSCTL / "ip_forward").read_text().strip() == "1"
