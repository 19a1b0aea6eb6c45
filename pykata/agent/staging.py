"""Much data on its way to the guest, beside the port: agent.proto, "Staged data".

A port takes 4 KiB at a time, each with an interrupt for the guest; a disk takes large requests. So data is put into
memory that the guest has as a disk. That is in a slot of the machine's that nobody else needs at the moment: it is
borrowed when a call sends much, and given back when no such call is left, or as soon as somebody else wants it. Whoever
finds none sends by the port.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, closing
from typing import Protocol

import anyio
from attrs import define, field

from pykata.agent.bulk import STAGED, frame
from pykata.errors import AgentError, AgentProtocolError, AgentTimeoutError, HostError, VMError
from pykata.host import memory_file, seal_size
from pykata.spec import LentSlot

log = logging.getLogger(__name__)

BLOCK = 4096                    # bytes; pieces begin and end at a multiple of this
PIECE = 512 * 1024              # the most bytes of one
PIECES = 16                     # in the memory of a sandbox
AHEAD = 2 * 1024 * 1024         # bytes of a call that may wait there for its process
LEAST = 64 * 1024               # bytes; what is less goes by the port
MUCH = 2 * 1024 * 1024          # bytes of a call after which it is worth to borrow a slot, which takes milliseconds
RETRY = 1.0                     # seconds after which one is looked for again
DEADLINE = 10.0                 # seconds that an agent may take to open or close it
OPEN, CLOSE, SYNC, REFUSED = b"o", b"c", b"s", b"!"
SYNCED = 15                     # calls that are named in one SYNC at most

Lend = Callable[[int, Callable[[], None]], AbstractAsyncContextManager[LentSlot | None]]
"""A free disk slot with a memory file in it; None: there is none. The callable is called when it is wanted back."""


class Wire(Protocol):
    """What it needs of the connection."""

    @property
    def has_failed(self) -> bool: ...
    def write(self, data: bytes) -> None: ...
    def expect_staging_answer(self) -> None: ...


@define(eq=False)
class Pieces:
    """The memory while the agent has it open, and which pieces of it are free."""

    memory: mmap.mmap
    free: list[int] = field(factory=lambda: list(range(PIECES)))
    left: list[Piece] = field(factory=list)     # of calls that are over: it isn't known whether they were read

    @property
    def waiting(self) -> int:
        """How many are on their way to processes, for all that is known."""
        return PIECES - len(self.free) - len(self.left)


@define(eq=False)
class Piece:
    """A piece that the agent was told of."""

    pieces: Pieces
    number: int
    call: int
    size: int

    def was_read(self) -> None:
        """The agent has said so: it can be used again."""
        self.pieces.free.append(self.number)


class Staging:
    """The way beside the port, for all calls of a connection. No slot is taken before much is being sent."""

    def __init__(self, wire: Wire, lend: Lend) -> None:
        self._wire = wire
        self._lend = lend
        self._pieces: Pieces | None = None
        self._fetched: list[Pieces] = []    # of slots that were given back: what waited there is in the agent's memory
        self._task: asyncio.Task[None] | None = None
        self._recalled = False
        self._is_barred = self._is_broken = False
        self._users = 0         # calls that send much
        self._not_before = 0.0
        self._asked = self._said = b""
        self._news = asyncio.Event()

    # What calls use: nothing here waits.

    @property
    def is_open(self) -> bool:
        """Pieces may be there to be sent."""
        return self._pieces is not None

    @property
    def is_idle(self) -> bool:
        """There is no slot, and none is being borrowed."""
        return self._task is None

    @property
    def has_room(self) -> bool:
        """There is a piece that is free, beyond as many as the agent has in its own memory: it never has more there."""
        return self._pieces is not None and len(self._pieces.free) > self._held

    @property
    def _held(self) -> int:
        """Pieces in the agent's memory."""
        return sum(pieces.waiting for pieces in self._fetched)

    def join(self) -> None:
        """A call sends much, and will :meth:`leave`."""
        self._users += 1

    def want(self) -> None:
        """It would like to send it beside the port: borrow a slot, if that hasn't been done and there is one."""
        may = not (self._task or self._is_barred or self._is_broken) and self._held < PIECES
        if may and time.monotonic() >= self._not_before:
            self._recalled = False
            self._task = asyncio.create_task(self._borrow())

    def send(self, call: int, data: memoryview) -> Piece | None:
        """Send as much of ``data`` as goes into a piece. None: it has to go by the port."""
        size = min(len(data), PIECE) // BLOCK * BLOCK
        if (pieces := self._pieces) is None or not self.has_room or size < LEAST or self._wire.has_failed:
            return None
        number = pieces.free.pop()
        at = number * PIECE
        pieces.memory[at : at + size] = data[:size]
        self._wire.write(frame(call, STAGED, (at // BLOCK).to_bytes(4) + size.to_bytes(4)))
        return Piece(pieces, number, call, size)

    def leave(self, left: Iterable[Piece]) -> None:
        """A call is over; the agent has read these pieces of it, or will. After the last one the slot is given back."""
        for piece in left:
            piece.pieces.left.append(piece)
        self._users -= 1
        self._recalled |= not self._users
        self._news.set()

    async def left(self) -> None:
        """Wait until the slot has been given back, if no call needs it any more."""
        if self._task is not None and not self._users:
            await asyncio.wait([self._task])

    # What the connection tells.

    def answered(self, data: bytes) -> None:
        """The agent has done what it was asked for."""
        if self._asked and data not in (self._asked, REFUSED):
            raise AgentProtocolError(f"the agent answered {data!r} about a disk when it was asked {self._asked!r}")
        self._said = data
        self._news.set()

    def recall(self) -> None:
        """Somebody else wants the slot."""
        self._not_before = time.monotonic() + RETRY
        self._recalled = True
        self._news.set()

    # Its owner's.

    async def rest(self) -> None:
        """Give the slot back and take none, until :meth:`go_on`: all that was sent so far has been read then."""
        self._is_barred = True
        try:
            await self._return()
        except BaseException:
            self._is_barred = False
            raise

    async def _return(self) -> None:
        if self._task is not None:
            self._recalled = True
            self._news.set()
            await asyncio.wait([self._task])

    def go_on(self) -> None:
        """A slot may be borrowed again."""
        self._is_barred = False

    async def aclose(self) -> None:
        """The connection is about to end: what was sent isn't needed any more."""
        self._is_barred = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _borrow(self) -> None:
        """From a slot that is free to one that is given back."""
        try:
            with memory_file(PIECES * PIECE) as file:
                seal_size(file)     # else who breaks into the hypervisor could take away what we write to
                with closing(mmap.mmap(file, PIECES * PIECE)) as memory:
                    async with self._lend(file, self.recall) as slot:
                        if slot is None:
                            raise HostError("all disk slots of the machine are taken")
                        await self._use(slot, Pieces(memory))
        except (HostError, VMError, AgentError, OSError) as exc:
            log.debug("data goes by the port: %s", exc)
            self._not_before = time.monotonic() + RETRY
        finally:
            self._task = None

    async def _use(self, slot: LentSlot, pieces: Pieces) -> None:
        try:
            said = await self._ask(OPEN, slot.serial.encode())
            if said == OPEN:
                self._pieces = pieces
                await self._until_recalled(pieces)
            self._pieces = None
            await self._ask(CLOSE)
            if said == REFUSED:
                raise HostError(f"the agent can't open the disk {slot.serial!r}")
        except asyncio.CancelledError:
            slot.is_lost = True         # it has it open: by the end of the connection, after which nobody needs a slot
            raise
        except AgentTimeoutError as exc:
            slot.is_lost = self._is_broken = True       # nobody knows whether it has it open
            log.warning("disk %s is lost: %s", slot.serial, exc)
            raise
        finally:
            self._pieces = None
            self._fetched = [some for some in (*self._fetched, pieces) if some.waiting]

    async def _until_recalled(self, pieces: Pieces) -> None:
        while not self._recalled:
            if pieces.left:
                left, pieces.left = pieces.left[:SYNCED], pieces.left[SYNCED:]
                await self._ask(SYNC, b"".join([call.to_bytes(4) for call in {piece.call for piece in left}]))
                pieces.free.extend([piece.number for piece in left])
                continue
            self._news.clear()
            await self._news.wait()

    async def _ask(self, asked: bytes, which: bytes = b"") -> bytes:
        """Ask the agent for something that it does when all that was sent before was read; what it says."""
        self._asked, self._said = asked, b""
        self._wire.expect_staging_answer()
        self._wire.write(frame(0, STAGED, asked + which))
        try:
            with anyio.move_on_after(DEADLINE):
                while not self._said and not self._wire.has_failed:
                    self._news.clear()
                    await self._news.wait()
                return self._said
            raise AgentTimeoutError(f"the agent didn't answer {asked!r} about a disk within {DEADLINE:g} s")
        finally:
            self._asked = b""
