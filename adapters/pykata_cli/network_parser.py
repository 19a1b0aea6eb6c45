"""Options about the network."""

from __future__ import annotations

from typing import Any


def add_network(group: Any) -> None:
    """How the guest is connected, and what it may reach."""
    group.add_argument(
        "--network", metavar="NAME[:OPTIONS]",
        help="none (the default), user, tcfilter:netns=NAME, ...; with a port or --allow the default is user",
    )
    group.add_argument(
        "-p", "--publish", metavar="[[ADDRESS:]PORT:]PORT[/udp]", action="append", default=[],
        help="lead a port of the host (on 127.0.0.1) to one of the guest; 0 or nothing picks a free one, and tells it",
    )
    group.add_argument(
        "--allow", metavar="WHERE", action="append", default=[],
        help="reach this and nothing else: pypi.org, *.debian.org:443, 10.0.0.0/8; repeatable",
    )
    group.add_argument(
        "--deny", metavar="WHERE", action="append", default=[], help="don't reach this; wins over --allow"
    )
    group.add_argument("--dns", metavar="ADDRESS", action="append", default=[], help="name server of the containers")
    group.add_argument("--dns-search", metavar="DOMAIN", action="append", default=[], help="their search domain")
    group.add_argument("--add-host", metavar="NAME:ADDRESS", action="append", default=[], help="a name in /etc/hosts")
    group.add_argument(
        "--network-log", metavar="FILE", help="write what the policy denies and allows to this file, as lines of JSON"
    )
