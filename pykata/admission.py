"""Who may start a virtual machine now: as many at a time as there are cores, as long as the memory lasts.

Both hold for all processes of a user together. More boots than cores at a time make each other late, up to none of
them getting anywhere; more machines than memory drag the host down with all that runs on it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
from anyio.lowlevel import RunVar

from pykata import host
from pykata.concurrency import boot_slots
from pykata.errors import AdmissionError, ConfigError
from pykata.host import Room
from pykata.spec import MIB

BOOTED = 128 * MIB
"""What a machine takes by the time its agent answers. What its guest uses later is not reserved."""
RESTORED = 32 * MIB
"""The same of one that goes on from a saved one, whose memory it shares."""
LEAST_RESERVE = 256 * MIB
RESERVE = 0.05
"""The part of all memory that is left to others, and to the guests that grow."""
AGAIN = 0.25
"""Seconds until the next look at the memory."""


_givers: RunVar[list[Callable[[], bool]]] = RunVar("pykata_givers")      # of this event loop


@asynccontextmanager
async def admitted(cost: int, timeout: float) -> AsyncIterator[None]:
    """One's turn to start a machine that takes ``cost`` bytes. Waits ``timeout`` seconds for memory at most.

    Raises :class:`AdmissionError`.
    """
    async with boot_slots(), _slot_of_the_user():
        if not await _room_for(cost, timeout):
            raise _refused(cost, timeout)
        yield


@asynccontextmanager
async def admitted_now(cost: int) -> AsyncIterator[bool]:
    """The same for one that nobody waits for: whether there is memory for it now. Nobody gives up anything for it."""
    async with boot_slots(), _slot_of_the_user():
        yield fits(cost * _cores(), host.room())


@contextmanager
def giving(give_up: Callable[[], bool]) -> Iterator[None]:
    """While the block runs, ``give_up`` is called where memory is missing. It has one machine end, if there is one."""
    givers = _givers.get([])
    _givers.set(givers)
    givers.append(give_up)
    try:
        yield
    finally:
        givers.remove(give_up)


@asynccontextmanager
async def _slot_of_the_user() -> AsyncIterator[None]:
    folder = host.run_root() / ".slots"
    folder.mkdir(mode=0o700, exist_ok=True)
    async with host.locked_one_of([folder / str(number) for number in range(_cores())]):
        yield


def _cores() -> int:
    return len(os.sched_getaffinity(0))


async def _room_for(cost: int, timeout: float) -> bool:
    # The others who have a slot may have been admitted by the same reading.
    cost_of_all = cost * _cores()
    with anyio.move_on_after(timeout):
        while not fits(cost_of_all, host.room()):
            any(give_up() for give_up in _givers.get([]))       # the first that has something to give
            await anyio.sleep(AGAIN)    # nobody tells when memory has become free
        return True
    return False


def _refused(cost: int, timeout: float) -> AdmissionError:
    found = host.room()
    used = [str(use) for use in host.in_use()]
    return AdmissionError(
        f"there is no room for another sandbox: {found.available // MIB} MiB of memory are free, it takes "
        f"{cost // MIB} MiB, and {reserve(found) // MIB} MiB are left to others; waited {timeout:g} s",
        hint="sandboxes of this user, those that wait included: "
             f"{'; '.join(used) or 'none'}. Leave some, or raise admission_timeout",
        used=used,
    )  # fmt: skip


def check_memory(size: int) -> None:
    """Refuse a guest with so many bytes of memory where that is more than this machine has. Raises ConfigError."""
    most = host.all_memory()
    if size > most:
        raise ConfigError(f"memory={size // MIB} MiB is more than this machine has: {most // MIB} MiB, swap included",
                          hint="give less; guests take of it only what they use")


def fits(cost: int, found: Room) -> bool:
    """Whether so many bytes can be taken."""
    return found.available - reserve(found) >= cost


def reserve(found: Room) -> int:
    """Bytes that are left free."""
    return max(LEAST_RESERVE, int(found.total * RESERVE))
