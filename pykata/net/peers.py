"""The name server of a guest in a network that pykata owns: it knows the other guests, and asks others for the rest.

Each guest has one of its own, run by the process that runs the guest: none has to be elected, or to outlive the others.
Who is there is read when it is asked: a name is a file, and valid while its owner's address is leased.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from pykata.host import finish
from pykata.net.leases import held
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, socket_in
from pykata.net.owned import BRIDGE, Member, Plan

if TYPE_CHECKING:
    import dns.message

MOST_QUESTIONS = 32     # at a time; a resolver asks again
TTL = 5                 # seconds: others come and go


@contextmanager
def named(member: Member, name: str) -> Iterator[None]:
    """Others in the network find the guest by its name."""
    folder = member.directory / "names"
    folder.mkdir(mode=0o700, exist_ok=True)
    file = folder / str(member.number)
    file.write_text(name.lower())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def addresses_of(name: str, plan: Plan, directory: Path) -> list[str]:
    """Those of the guests of this name that are there now."""
    found = []
    for file in (directory / "names").glob("*"):
        with suppress(OSError, ValueError):
            number = int(file.name)
            if file.read_text() == name.lower() and held(directory / "leases", number):
                found += [plan.address(number), *([plan.address6(number)] if plan.subnet6 else [])]
    return sorted(each.partition("/")[0] for each in found)


@asynccontextmanager
async def answering(member: Member) -> AsyncIterator[str]:
    """Answer the guest's questions for as long as the block runs; yields the address to ask."""
    from pykata.net.policy.resolve import load

    address = member.plan.resolver(member.number)
    await asyncio.to_thread(load)
    async with netlink(member.netns) as kernel:
        index = (await kernel.link(BRIDGE)).index
        await kernel.add_address(index, f"{address}/32")
    try:
        with _bound(member.netns, address) as server:
            task = asyncio.create_task(_serve(server, member))
            try:
                yield address
            finally:
                task.cancel()
                await finish(asyncio.wait([task]))
    finally:
        await finish(_forget(member.netns, address))


@contextmanager
def _bound(netns: Netns, address: str) -> Iterator[socket.socket]:
    with socket_in(netns, socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setblocking(False)
        server.bind((address, 53))
        yield server


async def _forget(netns: Netns, address: str) -> None:
    async with netlink(netns) as kernel:
        await kernel.delete_address((await kernel.link(BRIDGE)).index, f"{address}/32")


async def _serve(server: socket.socket, member: Member) -> None:
    loop = asyncio.get_running_loop()
    guest = member.plan.address(member.number).partition("/")[0]
    room = anyio.Semaphore(MOST_QUESTIONS)
    async with anyio.create_task_group() as tasks:
        while True:
            raw, peer = await loop.sock_recvfrom(server, 4096)
            if peer[0] == guest:        # nobody else's questions
                await room.acquire()
                tasks.start_soon(_answer, server, raw, peer, member, room)


async def _answer(
    server: socket.socket, raw: bytes, peer: tuple[str, int], member: Member, room: anyio.Semaphore
) -> None:
    try:
        answer = await answer_to(raw, member.plan, member.directory)
        if answer is not None:
            with suppress(OSError):
                await asyncio.get_running_loop().sock_sendto(server, answer, peer)
    finally:
        room.release()


async def answer_to(raw: bytes, plan: Plan, directory: Path) -> bytes | None:
    """The answer to a question of the guest's; None for what is none."""
    import dns.exception
    import dns.flags
    import dns.message
    import dns.rcode

    from pykata.net.policy.resolve import resolve

    try:
        query = dns.message.from_wire(raw)
    except (dns.exception.DNSException, ValueError):
        return None
    if not isinstance(query, dns.message.QueryMessage) or query.flags & dns.flags.QR or len(query.question) != 1:
        return None
    answer = _of_peers(query, plan, directory)
    if answer is None:
        with suppress(dns.exception.DNSException, OSError):
            answer = await resolve(query, ())
    if answer is None:
        answer = dns.message.make_response(query)
        answer.set_rcode(dns.rcode.SERVFAIL)
    answer.id = query.id
    most = min(query.payload if query.edns >= 0 else 512, 1232) or 512
    try:
        return answer.to_wire(max_size=max(most, 512))
    except dns.exception.TooBig:
        cut = dns.message.make_response(query)
        cut.flags |= dns.flags.TC
        return cut.to_wire()


def _of_peers(query: dns.message.QueryMessage, plan: Plan, directory: Path) -> dns.message.Message | None:
    import dns.message
    import dns.rdatatype
    import dns.rrset

    question = query.question[0]
    found = addresses_of(question.name.to_text(omit_final_dot=True), plan, directory)
    if not found:
        return None
    answer = dns.message.make_response(query, recursion_available=True)
    kind = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 6}.get(question.rdtype)
    texts = [each for each in found if ipaddress.ip_address(each).version == kind]
    if texts:
        answer.answer.append(dns.rrset.from_text_list(question.name, TTL, "IN", question.rdtype, texts))
    return answer
