"""Tars as streams: a tree of a container as one, and one that comes from somewhere unpacked in a container.

What passes is read entry by entry, and written anew, in a thread: so what comes from a guest is a tar and nothing else,
with names below its top, and a tar of any writer reaches the guest in the one form that the agent reads.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from inspect import isawaitable
from pathlib import Path
from typing import IO, cast

import anyio
from attrs import define, evolve, field

from pykata.concurrency import alongside
from pykata.errors import ConfigError, UnsafeTreeError
from pykata.files import v1
from pykata.files.extract import Bounds, expect_end
from pykata.files.handover import Handover
from pykata.files.pack import PIECE, SKIPPED, Sink
from pykata.files.paths import text
from pykata.files.session import Session
from pykata.files.threads import ended, in_thread, pipe_for, result_of
from pykata.files.values import Transfer
from pykata.host import PipeReader, finish
from pykata.images.compression import decompressed
from pykata.images.entry import BadEntryError, Entry, Kind
from pykata.images.layers import Output
from pykata.images.stream import Reader, StreamError
from pykata.images.tar_reader import TarReader
from pykata.images.tar_writer import END, header, padding

KEPT = (Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.HARDLINK)
"""What an upload has of a tar; the rest is left out, and said."""

Give = Callable[[bytes], Awaitable[object] | object]
Take = Callable[[], Awaitable[bytes] | bytes]


async def download_tar(session: Session, path: bytes, give: Give, bounds: Bounds) -> Transfer:
    """Pass a file or a directory of the container to ``give``, as a tar whose top has its name."""
    found = await session.attributes(v1.Request(stat=v1.Stat(path=path, follow=True)), path)
    name = path.rstrip(b"/").rpartition(b"/")[2]
    top = b"" if name in (b".", b"..") else name
    is_tree = stat.S_ISDIR(found.mode)

    async def given(piece: bytes) -> None:
        if isawaitable(answer := give(piece)):
            await answer

    async with session.own() as tool:
        await tool.begin(v1.Request(pack=v1.Pack(path=path)), path)
        await tool.done()
        tool.idle = False
        return await _passed(tool.data, given, partial(_from_guest, top=top, is_tree=is_tree, bounds=bounds))


async def upload_tar(session: Session, take: Take, request: v1.Unpack) -> Transfer:
    """Unpack in a directory of the container the tar that ``take`` gives piece by piece."""

    async def taken() -> bytes:
        piece = take()
        return bytes(await piece if isawaitable(piece) else piece)

    async with session.own() as tool:
        await tool.begin(v1.Request(unpack=request), request.path)
        await tool.done()
        tool.idle = False
        transfer = await _passed(taken, tool.send, _to_guest)
        await tool.complete()
        return transfer


async def _passed(
    take: Callable[[], Awaitable[bytes]], give: Callable[[bytes], Awaitable[object]],
    work: Callable[[Iterator[bytes], int], Transfer],
) -> Transfer:  # fmt: skip
    """From ``take`` by way of a thread to ``give``; an empty piece is the end."""
    pieces = Handover()
    reader, writer = pipe_for(Path("-"))
    out = PipeReader(cast(IO[bytes], os.fdopen(reader, "rb", buffering=0)))

    def over() -> None:
        pieces.refuse()
        os.close(writer)

    def worked() -> Transfer:
        try:
            return work(iter(pieces), writer)
        finally:
            over()

    async def feed() -> None:
        try:
            while (piece := await take()) and await pieces.put(piece):
                pass                # the thread that takes no more says why
        finally:
            pieces.end()

    working = in_thread(worked, unbegun=over)
    try:
        async with alongside(feed()):
            with suppress(anyio.EndOfStream):
                while True:
                    await give(await out.receive(PIECE))
    finally:
        pieces.end()                # the thread, if it isn't done, finds the tar cut off
        out.close()                 # ... or gets a BrokenPipeError
        await finish(ended(working))
        working.exception()
    return result_of(working, Path("-"))


def _from_guest(
    pieces: Iterator[bytes], descriptor: int, *, top: bytes, is_tree: bool, bounds: Bounds
) -> Transfer:
    """Write the guest's tar anew: of a tree with ``top`` before each name, of a file with that as its name."""
    try:
        if is_tree:
            return _rewritten(pieces, descriptor, partial(_below, top), bounds)
        return _rewritten(pieces, descriptor, partial(_only, top), evolve(bounds, entries=1))
    except BadEntryError as exc:
        raise UnsafeTreeError(f"the guest sent a bad archive: {exc.why}", path=text(exc.path)) from exc
    except StreamError as exc:
        raise UnsafeTreeError(f"the guest sent a bad archive: {exc}") from exc


def _to_guest(pieces: Iterator[bytes], descriptor: int) -> Transfer:
    """Write a tar of the host anew, unpacked if it is compressed."""
    try:
        return _rewritten(decompressed(pieces), descriptor, _Kept())
    except BadEntryError as exc:
        entry = f"{text(exc.path)!r}: " if exc.path else ""
        raise ConfigError(f"the tar can't be unpacked: {entry}{exc.why}") from exc
    except StreamError as exc:
        hint = "a tar, plain or compressed by gzip, zstd or xz"
        raise ConfigError(f"the tar can't be unpacked: {exc}", hint=hint) from exc


@define
class _Kept:
    """Leaves out what isn't of :data:`KEPT`, and hard links to that, which would lead to nothing."""

    _left_out: set[int] = field(factory=set)    # hashes of paths: a tar may have millions

    def __call__(self, entry: Entry) -> Entry | None:
        if entry.kind in KEPT and not (entry.kind is Kind.HARDLINK and hash(entry.link) in self._left_out):
            self._left_out.discard(hash(entry.path))
            return entry
        self._left_out.add(hash(entry.path))
        return None


@define
class _Links:
    """The symbolic links of a guest's tar: what came after one and led through it could be unpacked anywhere."""

    _known: set[int] = field(factory=set)       # hashes of paths: there may be as many as entries

    def check(self, entry: Entry) -> None:
        """Raises BadEntryError. A file in place of a link is bad as well: some unpack it into what that leads to."""
        if self._known and (
            self._leads(entry.path, itself=entry.kind is Kind.FILE)
            or (entry.kind is Kind.HARDLINK and self._leads(entry.link, itself=False))
        ):
            raise BadEntryError("it leads through a symbolic link", entry.path)
        if entry.kind is Kind.SYMLINK or (entry.kind is Kind.HARDLINK and hash(entry.link) in self._known):
            self._known.add(hash(entry.path))

    def _leads(self, path: bytes, *, itself: bool) -> bool:
        parts = path.split(b"/")
        return any(hash(b"/".join(parts[:end])) in self._known for end in range(1, len(parts) + itself))


def _only(name: bytes, entry: Entry) -> Entry:
    if entry.kind is not Kind.FILE:
        raise UnsafeTreeError("the guest sent something else than the file that was asked for")
    return evolve(entry, path=name)


def _below(top: bytes, entry: Entry) -> Entry:
    if not entry.path and entry.kind is not Kind.DIRECTORY:
        raise UnsafeTreeError("the guest sent something else than a directory in place of its top")
    if not top:
        return entry
    link = b"/".join((top, entry.link)) if entry.kind is Kind.HARDLINK else entry.link
    return evolve(entry, path=b"/".join(filter(None, (top, entry.path))), link=link)


def _rewritten(
    pieces: Iterator[bytes], descriptor: int, pick: Callable[[Entry], Entry | None], bounds: Bounds | None = None
) -> Transfer:
    source, out = Reader(pieces), Output(cast(IO[bytes], Sink(descriptor)))
    tar = TarReader(source)
    entries = size = 0
    links = _Links()
    skipped: list[str] = []
    for entry in tar:
        if (wanted := pick(entry)) is None:
            skipped += [text(entry.path)] if len(skipped) < SKIPPED else []
            continue
        entries, size = entries + 1, size + entry.size
        if bounds is not None:
            bounds.check(entries, size)
            links.check(wanted)
        out.write(header(wanted, exact=True))
        for piece in tar.data():
            out.write(bytes(piece))
        out.write(padding(entry.stored))
    if bounds is not None:
        expect_end(source)
        if not entries:
            raise UnsafeTreeError("the guest sent an empty archive")
    else:
        deque(pieces, maxlen=0)         # who writes it shall come to its end
    out.write(END)
    out.flush()
    return Transfer(entries, size, tuple(skipped))
