"""Questions that a guest asks of DNS, and the answers that it gets (RFC 1035, RFC 8914 for the reasons).

Nothing of a question goes any further but its name and type, and only of names that are allowed: what would be asked is
told to whoever owns the name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from pykata.net.policy.addresses import Address
from pykata.net.policy.shown import RefusedError

if TYPE_CHECKING:
    import dns.message

MOST_QUESTION = 512
MOST_ADDRESSES = 32
MOST_TTL = 3600
KNOWN_TTL = 5
MOST_ANSWER = 1232          # bytes that no network has to cut into fragments (RFC 9715)
VERSIONS = {"A": 4, "AAAA": 6}
ADDRESSES = tuple(VERSIONS)
OTHERS = ("CNAME", "MX", "SRV", "TXT", "NS", "SOA")
"""What else is passed on of names that are allowed."""
_PLAIN = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
LASTING = ("NOERROR", "NXDOMAIN")


@frozen
class Question:
    """What a guest asks. ``name`` is in lower case, without the last dot; ``kind`` is such as ``"AAAA"``."""

    name: str
    kind: str
    message: dns.message.QueryMessage

    @property
    def is_plain(self) -> bool:
        """Is it one that a host may have? A label with a dot in it (RFC 2181, 11) would look like two of them."""
        return bool(_PLAIN.fullmatch(self.name))


@frozen
class Found:
    """An answer for the guest, and where the name leads: what of it was allowed, and what not."""

    wire: bytes
    addresses: tuple[Address, ...] = ()
    refused: tuple[Address, ...] = ()
    aliases: tuple[str, ...] = ()
    ttl: float = 0.0


def question(payload: bytes) -> Question:
    """The question in a packet. Raises RefusedError."""
    import dns.exception
    import dns.flags
    import dns.message
    import dns.opcode
    import dns.rdataclass
    import dns.rdatatype

    if len(payload) > MOST_QUESTION:
        raise RefusedError("dns", "a question of DNS that is too long")
    try:
        message = dns.message.from_wire(payload)
    except (dns.exception.DNSException, ValueError) as exc:
        raise RefusedError("dns", "what isn't a question of DNS") from exc
    if (
        not isinstance(message, dns.message.QueryMessage) or message.opcode() != dns.opcode.QUERY
        or message.flags & dns.flags.QR or len(message.question) != 1
        or message.question[0].rdclass != dns.rdataclass.IN
    ):  # fmt: skip
        raise RefusedError("dns", "what isn't a question of DNS")
    asked = message.question[0]
    name = asked.name.to_text(omit_final_dot=True).lower()
    return Question(name, dns.rdatatype.to_text(asked.rdtype), message)


def query(about: Question) -> dns.message.QueryMessage:
    """The same question as we ask it, with nothing of the guest's but the name and the type."""
    import dns.message

    return dns.message.make_query(f"{about.name}.", about.kind, use_edns=0, payload=MOST_ANSWER)


def empty(about: Question) -> bytes:
    """The answer that there is nothing of this type."""
    return _response(about).to_wire()


def known(about: Question, addresses: Sequence[Address]) -> bytes:
    """The answer about a name that isn't DNS's, but one that we know ourselves."""
    import dns.rrset

    response = _response(about)
    texts = [str(each) for each in addresses if about.kind == ("A" if each.version == 4 else "AAAA")]
    if texts:
        response.answer.append(dns.rrset.from_text(about.message.question[0].name, KNOWN_TTL, "IN", about.kind, *texts))
    return response.to_wire()


def refusal(about: Question, why: str) -> bytes:
    """The answer that the name doesn't exist, with the true reason for who can read it.

    REFUSED would be more honest, and resolvers would try again, or wait for somebody else's answer.
    """
    import dns.edns
    import dns.rcode

    response = _response(about)
    response.set_rcode(dns.rcode.NXDOMAIN)
    if about.message.edns >= 0:
        response.use_edns(0, payload=MOST_ANSWER, options=[dns.edns.EDEOption(dns.edns.EDECode.PROHIBITED, why)])
    return response.to_wire()


def failure(about: Question) -> bytes:
    """The answer that nobody answered."""
    import dns.rcode

    response = _response(about)
    response.set_rcode(dns.rcode.SERVFAIL)
    return response.to_wire()


def found(about: Question, answer: dns.message.Message, allowed: Callable[[Address], bool]) -> Found:
    """What the guest gets of an answer: what belongs to its question, and of addresses those that are ``allowed``.

    Raises RefusedError for an answer that contradicts itself.
    """
    import dns.exception
    import dns.message
    import dns.name
    import dns.rcode

    response = _response(about)
    response.set_rcode(answer.rcode())
    if dns.rcode.to_text(answer.rcode()) not in LASTING:
        return Found(failure(about))
    try:
        assert isinstance(answer, dns.message.QueryMessage)
        chain = answer.resolve_chaining()
    except (AssertionError, dns.exception.DNSException) as exc:
        raise RefusedError("dns", f"the answer about {about.name} contradicts itself") from exc
    aliases = tuple(each.target.to_text(omit_final_dot=True).lower() for rrset in chain.cnames for each in rrset)
    records = [] if chain.answer is None else list(chain.answer)
    good, bad = records, []
    addresses: tuple[Address, ...] = ()
    refused: tuple[Address, ...] = ()
    if about.kind in ADDRESSES:
        where = {record: ipaddress.ip_address(record.address) for record in records}
        good = [record for record in records if allowed(where[record])][:MOST_ADDRESSES]
        bad = [record for record in records if not allowed(where[record])]
        addresses, refused = tuple(where[each] for each in good), tuple(where[each] for each in bad)
    ttl = min([chain.minimum_ttl, *(rrset.ttl for rrset in chain.cnames), MOST_TTL])
    _add(response, chain.cnames, chain.answer, good, ttl)
    return Found(_fitting(about, response), addresses, refused, aliases, ttl)


def _add(
    response: dns.message.Message, cnames: Sequence[object], answer: object, good: Sequence[object], ttl: int
) -> None:
    import dns.rrset

    for rrset in cnames:
        assert isinstance(rrset, dns.rrset.RRset)
        response.answer.append(dns.rrset.from_rdata_list(rrset.name, ttl, list(rrset)))
    if good:
        assert isinstance(answer, dns.rrset.RRset)
        response.answer.append(dns.rrset.from_rdata_list(answer.name, ttl, good))  # type: ignore[arg-type]


def _fitting(about: Question, response: dns.message.Message) -> bytes:
    import dns.exception

    try:
        return response.to_wire(max_size=MOST_ANSWER)
    except dns.exception.DNSException:
        return failure(about)


def _response(about: Question) -> dns.message.QueryMessage:
    import dns.message

    response = dns.message.make_response(about.message, recursion_available=True, our_payload=MOST_ANSWER)
    assert isinstance(response, dns.message.QueryMessage)
    return response
