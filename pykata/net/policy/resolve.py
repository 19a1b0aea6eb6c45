"""Asking the name servers of the host, or those that were named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import dns.message

RESOLV_CONF = Path("/etc/resolv.conf")
TIMEOUT = 3.0           # seconds for each server
Server = tuple[str, int]


def load() -> None:
    """Import what is needed, which takes 0.1 s: call it in a thread, before anybody waits."""
    import dns.asyncbackend
    import dns.asyncquery
    import dns.edns
    import dns.flags
    import dns.rrset

    dns.asyncbackend.get_backend("asyncio")


def servers_of_host() -> list[Server]:
    """Those in resolv.conf(5), or one on this machine, which is what there is without any."""
    try:
        lines = [line.split() for line in RESOLV_CONF.read_text(errors="replace").splitlines()]
    except OSError:
        lines = []
    found = [(words[1], 53) for words in lines if len(words) > 1 and words[0] == "nameserver"]
    return found or [("127.0.0.1", 53)]


async def resolve(query: dns.message.QueryMessage, servers: Sequence[Server]) -> dns.message.Message | None:
    """The answer of the first server that has one; None if none has."""
    import dns.asyncbackend
    import dns.asyncquery
    import dns.exception
    import dns.rcode

    backend = dns.asyncbackend.get_backend("asyncio")
    last: dns.message.Message | None = None
    for where, port in servers or servers_of_host():
        try:
            answer, _ = await dns.asyncquery.udp_with_fallback(
                query, where, timeout=TIMEOUT, port=port, backend=backend, ignore_errors=True
            )
        except (dns.exception.DNSException, OSError, EOFError, ValueError):
            continue
        last = answer
        if answer.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            break
    return last
