"""The pieces of detached sandboxes: messages between processes, errors in them, and the log."""

from __future__ import annotations

import errno
import inspect
import json
import os
import socket
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from pykata import errors
from pykata.detached import directory as directories
from pykata.detached.directory import Claim, Directory, State
from pykata.detached.logs import LogPiece, Reader, read
from pykata.detached.remote import RemoteVM
from pykata.detached.welcome import Request, from_descriptor, to_descriptor
from pykata.detached.wire import MAX_PACKET, Message, Wire, pack_error, unpack_error
from pykata.errors import AgentRefusedError, DetachedError, GuestPanicError, ImageCorruptError, PykataError
from pykata.keeper.log import Log
from pykata.spec import Disk

# --- disks ---


async def test_a_keeper_gets_the_disk_that_was_looked_at(tmp_path: Path) -> None:
    class Keeping:
        async def call(self, do: str, *, descriptors: tuple[int, ...] = (), **more: object) -> Message:
            given.extend(os.pread(descriptor, 100, 0) for descriptor in descriptors)
            return Message({"ok": "vda"})

    given = list[bytes]()
    path = tmp_path / "disk"
    path.write_bytes(b"looked at")
    with path.open("rb") as disk:
        path.unlink()
        path.write_bytes(b"put in its place")
        welcome = SimpleNamespace(vmm=1, accel="tcg", spawned_at=0.0, ready_at=0.0, console="")
        vm = RemoteVM(cast(Any, Keeping()), cast(Any, welcome))
        async with vm.plug(Disk("d", path, descriptor=disk.fileno())) as name:
            assert name == "vda"
    assert given == [b"looked at"]


# --- messages ---


@pytest.fixture
def wires() -> Iterator[tuple[Wire, Wire, socket.socket]]:
    """Two ends, and the socket of the first."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends = Wire(ours), Wire(theirs)
    yield (*ends, ours)
    for end in ends:
        end.close()


Ends = tuple[Wire, Wire, socket.socket]


async def test_messages_and_descriptors_arrive(wires: Ends) -> None:
    one, other, _ = wires
    descriptor = os.memfd_create("passed")
    os.write(descriptor, b"content")
    await one.send({"id": 1, "text": "ä\ud800"}, (descriptor,))
    os.close(descriptor)
    message = await other.receive()
    assert message is not None
    assert message.body == {"id": 1, "text": "ä?"}
    (arrived,) = message.descriptors
    assert os.pread(arrived, 100, 0) == b"content"
    assert not os.get_inheritable(arrived)
    message.close()
    one.close()
    assert await other.receive() is None


@pytest.mark.parametrize("packet", [b"not json", b"[1]", b"3", b'"x"'])
async def test_what_is_no_message_ends_the_connection(wires: Ends, packet: bytes) -> None:
    _, other, raw = wires
    socket.send_fds(raw, [packet], [raw.fileno()])
    assert await other.receive() is None        # and nothing_left looks for the descriptor


async def test_sending_waits_for_room_and_several_may(wires: Ends) -> None:
    one, other, _ = wires
    count = 200
    text = "x" * (MAX_PACKET // 4)

    async def send(number: int) -> None:
        await one.send({"id": number, "text": text})

    received: set[int] = set()
    async with anyio.create_task_group() as tasks:
        for number in range(count):
            tasks.start_soon(send, number)
        while len(received) < count:
            message = await other.receive()
            assert message is not None
            received.add(message.body["id"])


async def test_sending_to_nobody(wires: Ends) -> None:
    one, other, _ = wires
    other.close()
    with pytest.raises(anyio.BrokenResourceError):
        await one.send({"id": 1})


def test_a_peer_of_another_user_is_refused(wires: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _, _ = wires
    one.check_peer()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(errors.NotPermittedError, match="uid 0"):
        one.check_peer()


def test_errors_keep_their_type_and_what_they_carry() -> None:
    sent = json.dumps(pack_error(GuestPanicError("it panicked", console="last words", hint="h")))
    panic = unpack_error(json.loads(sent))
    assert type(panic) is GuestPanicError
    assert (panic.message, panic.hint, panic.console) == ("it panicked", "h", "last words")
    refused = unpack_error(pack_error(AgentRefusedError("no", status="NOT_FOUND")))
    assert isinstance(refused, AgentRefusedError)
    assert refused.status == "NOT_FOUND"
    corrupt = unpack_error(pack_error(ImageCorruptError("bad", digest="sha256:0", reference="r")))
    assert isinstance(corrupt, ImageCorruptError)
    assert (corrupt.digest, corrupt.reference) == ("sha256:0", "r")


def test_every_error_type_survives() -> None:
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, PykataError):
            error = kind.__new__(kind)
            PykataError.__init__(error, "message", hint="hint")
            assert type(unpack_error(pack_error(error))) is kind
            assert str(unpack_error(pack_error(error))) == "message (hint)"


@pytest.mark.parametrize("raw", [{}, {"type": "os"}, {"type": "SystemExit"}, {"type": 3, "message": "m"}])
def test_strange_errors_are_errors(raw: dict[str, object]) -> None:
    assert type(unpack_error(raw)) is PykataError


def test_an_error_that_is_not_ours() -> None:
    assert "ZeroDivisionError: by zero" in str(unpack_error(pack_error(ZeroDivisionError("by zero"))))


def test_what_another_version_hands_over() -> None:
    descriptor = to_descriptor(Message({}))
    try:
        with pytest.raises(DetachedError, match="runs pykata"):
            from_descriptor(descriptor, Request)
        os.ftruncate(descriptor, 3)
        with pytest.raises(DetachedError, match="can't be read"):
            from_descriptor(descriptor, Request)
    finally:
        os.close(descriptor)


# --- directories ---


def test_a_claim_is_seen_as_alive_and_then_as_lost() -> None:
    with directories.claimed("one", State(name="one", phase="running")) as claim:
        assert claim.directory.read().phase == "running"
        with pytest.raises(DetachedError):
            directories.remove(claim.directory)
        assert [found.name for found in directories.every()] == ["one"]
    assert claim.directory.read().phase == "lost"
    directories.remove(claim.directory)
    assert directories.every() == []


def test_what_else_lies_among_the_sandboxes_is_none(claim: Claim) -> None:
    beside = claim.directory.path.parent
    stray, odd = beside / "notes", beside / "a b"
    stray.write_text("of the user's")
    odd.mkdir()
    assert [one.name for one in directories.every()] == [claim.directory.name]
    stray.unlink()
    odd.rmdir()


def test_one_that_was_killed_half_way_is_cleaned_up() -> None:
    half = directories.claimed("half", State(name="half", phase="starting"))
    with half as claim:
        hidden = claim.directory.path.with_name(".half")
        claim.directory.path.rename(hidden)
    assert directories.every() == []
    assert directories.leftovers() == [hidden]
    assert directories.leftovers() == []


def test_no_room_for_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Directory, state: State) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Directory, "write", full)
    with pytest.raises(errors.HostError, match="No space"), directories.claimed("x", State(name="x", phase="starting")):
        raise AssertionError
    assert not directories.every()
    assert not directories.leftovers()


# --- the log ---


@pytest.fixture
def claim() -> Iterator[Claim]:
    with directories.claimed("logged", State(name="logged", phase="running")) as taken:
        yield taken
    directories.remove(taken.directory)


def said(pieces: list[LogPiece]) -> list[bytes]:
    return [piece.data for piece in pieces]


def test_pieces_are_exact(claim: Claim) -> None:
    with Log(claim.directory.log) as log:
        log.write("stdout", b"text \xc3\xa4\n")
        log.write("stderr", b"\xff\0\n")
    with Reader(claim.directory.log) as reader:
        first, second = reader.pieces()
    assert (first.stream, first.data) == ("stdout", b"text \xc3\xa4\n")
    assert (second.stream, second.data) == ("stderr", b"\xff\0\n")
    assert second.time >= first.time > 0


def test_the_log_is_bounded_and_keeps_the_end(claim: Claim) -> None:
    with Log(claim.directory.log, limit=10_000) as log:
        for number in range(1000):
            log.write("stdout", b"%d\n" % number)
    sizes = [file.stat().st_size for file in claim.directory.path.glob("log*")]
    assert len(sizes) == 2
    assert sum(sizes) <= 10_000
    with Reader(claim.directory.log) as reader:
        numbers = [int(piece.data) for piece in reader.pieces()]
    assert numbers == list(range(numbers[0], 1000))
    assert len(numbers) > 50


def test_a_reader_goes_on_after_each_rotation(claim: Claim) -> None:
    with Log(claim.directory.log, limit=1000) as log, Reader(claim.directory.log) as reader:
        seen = []
        for number in range(200):
            log.write("stdout", b"%d\n" % number)
            seen += said(list(reader.pieces()))
        assert seen == [b"%d\n" % number for number in range(200)]


def test_a_reader_that_is_too_slow_loses_the_middle_and_goes_on(claim: Claim) -> None:
    with Log(claim.directory.log, limit=1000) as log, Reader(claim.directory.log) as reader:
        log.write("stdout", b"-1\n")
        for number in range(500):
            log.write("stdout", b"%d\n" % number)
        numbers = [int(piece.data) for piece in reader.pieces()]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (-1, 499)


def test_half_a_line_is_not_read(claim: Claim) -> None:
    with Log(claim.directory.log) as log:
        log.write("stdout", b"whole\n")
    with claim.directory.log.open("ab") as file:
        file.write(b'{"t": 1, "s": "std')
    with Reader(claim.directory.log) as reader:
        assert said(list(reader.pieces())) == [b"whole\n"]


def test_a_full_disk_loses_pieces_and_nothing_else(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def short(descriptor: int, data: bytes) -> int:
        real(descriptor, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Log(claim.directory.log) as log:
        log.write("stdout", b"before\n")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", short)
            log.write("stdout", b"lost\n")
        log.write("stdout", b"after\n")
        assert log.lost == 1
    with Reader(claim.directory.log) as reader:
        assert said(list(reader.pieces())) == [b"before\n", b"after\n"]


async def test_following_one_that_has_ended_ends(claim: Claim) -> None:
    with Log(claim.directory.log) as log:
        log.write("stdout", b"all there is\n")
    claim.listener.close()
    claim.directory.write(State(name="logged", phase="ended"))
    async with aclosing(read(claim.directory, follow=True)) as pieces:
        assert [piece.data async for piece in pieces] == [b"all there is\n"]


def test_a_log_that_was_never_begun(tmp_path: Path) -> None:
    with Reader(tmp_path / "log") as reader:
        assert list(reader.pieces()) == []
