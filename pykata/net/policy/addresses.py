"""Which addresses need to be named to be reached."""

from __future__ import annotations

import ipaddress
import socket

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# Reached only under an entry that lies within one of them: "0.0.0.0/0" doesn't name the metadata service, and
# "169.254.169.254" does.
PROTECTED: tuple[IPNetwork, ...] = tuple(
    ipaddress.ip_network(each)
    for each in (
        "0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16",       # this host, and metadata on most clouds
        "100.100.100.200", "168.63.129.16", "192.0.0.192",  # metadata of Alibaba, Azure, Oracle
        "224.0.0.0/4", "240.0.0.0/4",
        "::/128", "::1/128", "fe80::/10", "fec0::/10", "ff00::/8",
        "fd00:ec2::/32", "fd20:ce::254", "fd00:42::42",     # metadata of Amazon, Google, Scaleway
    )
)  # fmt: skip

# They hold an IPv4 address that somebody on the way may take out: what they lead to isn't what they look like.
WRAPPING: tuple[IPNetwork, ...] = tuple(
    ipaddress.ip_network(each)
    for each in ("::/8", "::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
)
GLOBAL6 = ipaddress.IPv6Network("2000::/3")     # all that IPv6 has given to anybody (RFC 4291, 2.4)


def must_be_named(address: Address) -> tuple[IPNetwork, ...]:
    """The networks within which an entry must lie to be about this address; none for ordinary addresses."""
    return tuple(each for each in (*PROTECTED, *WRAPPING) if address.version == each.version and address in each)


def is_public(address: Address) -> bool:
    """May an answer of DNS lead there? Not to what is inside a network, nor to what wraps such an address."""
    if address.version == 6 and address not in GLOBAL6:
        return False
    return address.is_global and not address.is_multicast and not must_be_named(address)


def is_hosts_own(address: Address) -> bool:
    """Is it an address of this machine, in this process's network namespace? Asked anew each time: they change."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
