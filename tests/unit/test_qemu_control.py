"""The control channel against a peer that may say anything, and the parts that read what QEMU and a guest write."""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata.errors import HostError, NotPermittedError, ToolFailedError, ToolTooOldError, VMError
from pykata.host import PipeReader
from pykata.hypervisors.qemu import accel, version
from pykata.hypervisors.qemu.console import Followed, Tail
from pykata.hypervisors.qemu.qmp import LIMIT, QMP, QMPClosedError, QMPError

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": ["oob"]}}


class Peer:
    """QEMU's end."""

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        self.stream = stream
        self.received = bytearray()
        self.descriptors: list[int] = []

    async def say(self, *messages: object) -> None:
        text = b"".join(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
                        for message in messages)
        await asyncio.get_running_loop().sock_sendall(self.stream, text)

    async def hear(self) -> dict[str, object]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                heard, end = json.JSONDecoder().raw_decode(self.received.decode())
            except ValueError:
                readable = loop.create_future()
                loop.add_reader(self.stream, readable.set_result, None)
                await readable
                loop.remove_reader(self.stream)
                data, ancillary, _, _ = self.stream.recvmsg(65536, socket.CMSG_SPACE(4))
                for _, _, rights in ancillary:
                    self.descriptors.extend(array.array("i", rights))
                self.received += data
            else:
                del self.received[:end]
                assert isinstance(heard, dict)
                return heard

    async def answer(self, **reply: object) -> dict[str, object]:
        heard = await self.hear()
        await self.say({**reply, "id": heard["id"]})
        return heard


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[QMP, Peer, list[tuple[str, Mapping[str, object]]]]]:
    events: list[tuple[str, Mapping[str, object]]] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        qmp = QMP(ours, lambda name, data: events.append((name, data)))
        try:
            yield qmp, Peer(theirs), events
        finally:
            qmp.close()


async def test_greeting_and_commands() -> None:
    async with connected() as (qmp, peer, events):
        greeted = asyncio.ensure_future(qmp.negotiate())
        await peer.say(GREETING)
        assert (await peer.answer(**{"return": {}}))["execute"] == "qmp_capabilities"
        assert version.of_greeting(await greeted) == (7, 2, 22)

        with open("/dev/null", "rb") as sent:       # noqa: ASYNC230
            asked = asyncio.ensure_future(qmp.execute("add-fd", {"fdset-id": 1}, fd=sent.fileno()))
            await peer.say({"event": "RESUME", "timestamp": {}}, {"event": "SHUTDOWN", "data": {"guest": True}})
            heard = await peer.answer(**{"return": {"fd": 5}})
        assert heard["arguments"] == {"fdset-id": 1}
        assert await asked == {"fd": 5}
        assert events == [("RESUME", {}), ("SHUTDOWN", {"guest": True})]
        (got,) = peer.descriptors
        assert os.readlink(f"/proc/self/fd/{got}") == "/dev/null"
        os.close(got)

        asked = asyncio.ensure_future(qmp.execute("nonsense"))
        await peer.answer(error={"class": "CommandNotFound", "desc": "no such\x1b[31m"})
        with pytest.raises(QMPError, match=r"QEMU says: no such\\x1b\[31m"):
            await asked


async def test_one_command_at_a_time_even_if_its_caller_left() -> None:
    async with connected() as (qmp, peer, _):
        first = asyncio.ensure_future(qmp.execute("first"))
        second = asyncio.ensure_future(qmp.execute("second"))
        heard = await peer.hear()
        first.cancel()
        await asyncio.wait([first])
        assert heard["execute"] == "first"
        assert peer.received == b""
        await peer.say({"return": 1, "id": heard["id"]})
        assert (await peer.answer(**{"return": 2}))["execute"] == "second"
        assert await second == 2


@pytest.mark.parametrize("said", [
    b"{\n", b"[]\n", b"null\n", b"\xff\n", b"7\n", b'"QMP"\n', b'{"return": {}}\n', b'{"return": 1, "id": 999}\n',
    b'{"id": 1}\n' * 2, b"[" * 100_000 + b"\n", (json.dumps(GREETING).encode() + b"\n") * 2,
    b'{"event": 7}\n', b"",
])  # fmt: skip
async def test_a_peer_that_breaks_the_protocol(said: bytes) -> None:
    """Ends in an error of ours, and at once."""
    async with connected() as (qmp, peer, _):
        asked = asyncio.ensure_future(qmp.execute("query"))
        await peer.hear()
        if said:
            await peer.say(said)
        else:
            peer.stream.close()
        with pytest.raises(VMError):
            await asyncio.wait_for(asked, 120)
        await asyncio.wait_for(qmp.closed(), 120)
        with pytest.raises(QMPClosedError):
            await qmp.execute("query")


async def test_a_message_without_end() -> None:
    async with connected() as (qmp, peer, _):
        with pytest.raises((ConnectionError, BrokenPipeError)):
            await peer.say(b"x" * (LIMIT + 1_000_000))
        await asyncio.wait_for(qmp.closed(), 120)


async def test_closing_tells_everyone_once() -> None:
    async with connected() as (qmp, _, _):
        told: list[None] = []
        qmp.on_close = lambda: told.append(None)
        waiting = [asyncio.ensure_future(qmp.negotiate()), asyncio.ensure_future(qmp.execute("query"))]
        await asyncio.sleep(0)
        qmp.close()
        qmp.close()
        assert [type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)] == [QMPClosedError] * 2
        assert len(told) == 1


# --- the console ---


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_a_tail_is_bounded_and_printable(chunks: list[bytes]) -> None:
    tail = Tail(size=100)
    for chunk in chunks:
        tail.add(chunk)
        assert len(tail._kept) <= 100
    assert tail._kept == b"".join(chunks)[-100:]
    assert all(line.isprintable() for line in tail.text().split("\n"))


@pytest.fixture
def pipe() -> Iterator[tuple[PipeReader, IO[bytes]]]:
    ours, theirs = os.pipe()
    with open(ours, "rb", buffering=0) as end, open(theirs, "wb", buffering=0) as writer:
        yield PipeReader(end), writer


async def test_a_pipe_is_read_to_its_end(pipe: tuple[PipeReader, IO[bytes]]) -> None:
    reader, writer = pipe
    tail = Tail()
    followed = Followed(reader, tail)
    for part in (b"x" * 60_000, b"last ", b"words"):
        writer.write(part)
        await asyncio.sleep(0)
    assert not followed.ended.is_set()
    writer.close()
    await followed.ended.wait()
    assert tail._kept.endswith(b"xlast words")
    followed.close()


async def test_a_pipe_that_is_closed_is_read_no_more(pipe: tuple[PipeReader, IO[bytes]]) -> None:
    reader, writer = pipe
    tail = Tail()
    followed = Followed(reader, tail)
    followed.close()
    followed.close()
    await followed.ended.wait()
    writer.write(b"words")
    await asyncio.sleep(0)
    assert tail.text() == ""
    assert not asyncio.get_running_loop().remove_reader(reader.fileno())        # nothing watches it


@pytest.mark.parametrize(("said", "panic"), [
    (b"[    1.5] Kernel panic - not syncing: Attempted to kill init!\r\n[ 1.6] CPU: 0",
     "Kernel panic - not syncing: Attempted to kill init!"),
    (b"\x1b[1mKernel panic - not syncing: \x1b[31m\n", "Kernel panic - not syncing: \\x1b[31m"),
    (b"[    1.5] Kernel panic is a film\n", None),
    (b"", None),
])  # fmt: skip
def test_panics(said: bytes, panic: str | None) -> None:
    tail = Tail()
    tail.add(said)
    assert tail.panic() == panic


# --- versions ---


def test_versions() -> None:
    version.check((7, 2, 0), Path("qemu"))
    version.check((10, 0, 3), Path("qemu"))
    with pytest.raises(ToolTooOldError, match=r"qemu is QEMU 7\.1\.9 \(QEMU 7\.2 or later is needed\)"):
        version.check((7, 1, 9), Path("qemu"))
    with pytest.raises(ToolFailedError):
        version.of_greeting({"QMP": {"version": {}}})


# --- accelerators ---


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(accel, "CPUINFO", path)
    accel.cpu_flags.cache_clear()
    accel.tsc_khz.cache_clear()
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return path


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    accel.cpu_flags.cache_clear()
    accel.tsc_khz.cache_clear()


def test_a_device_is_no_proof(cpuinfo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "KVM", tmp_path / "kvm")
    (tmp_path / "kvm").touch()
    version_answered = accel.KVM_API_VERSION
    monkeypatch.setattr("fcntl.ioctl", lambda *_: version_answered)

    cpuinfo.write_text("flags\t\t: fpu tsc\n")
    assert accel.choose("auto") == "tcg"
    with pytest.raises(HostError, match="neither vmx nor svm"):
        accel.choose("kvm")

    accel.cpu_flags.cache_clear()
    cpuinfo.write_text("flags\t\t: fpu svm\n")
    assert accel.choose("auto") == accel.choose("kvm") == "kvm"
    assert accel.choose("tcg") == "tcg"

    version_answered = 11
    with pytest.raises(HostError, match="version 11"):
        accel.choose("kvm")
    version_answered = accel.KVM_API_VERSION
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(HostError, match="aarch64 host can't run"):
        accel.choose("kvm")


def test_no_device(cpuinfo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "KVM", tmp_path / "none")
    with pytest.raises(HostError, match="No such file"):
        accel.choose("kvm")

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(NotPermittedError, match="may not open"):
        accel.choose("kvm")
    assert accel.choose("auto") == "tcg"


@pytest.mark.parametrize(("text", "khz"), [
    ("flags : tsc constant_tsc\nbogomips\t: 5192.28\n", 2_596_140),
    ("flags : tsc\nbogomips\t: 5192.28\n", None),
    ("flags : tsc constant_tsc\n", None),
    ("", None),
])  # fmt: skip
def test_the_time_stamp_counter(cpuinfo: Path, text: str, khz: int | None) -> None:
    cpuinfo.write_text(text)
    assert accel.tsc_khz() == khz


async def test_a_qemu_that_does_not_answer_loses_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykata.hypervisors.qemu.qmp.PATIENCE", 0.05)
    async with connected() as (qmp, peer, _):
        stuck = asyncio.ensure_future(qmp.execute("qom-set"))
        waiting = asyncio.ensure_future(qmp.execute("add-fd"))
        with pytest.raises(QMPClosedError, match="QEMU didn't answer qom-set within 0"):
            await stuck
        with pytest.raises(QMPClosedError, match="can't add-fd"):
            await waiting
    monkeypatch.setattr("pykata.hypervisors.qemu.qmp.PATIENCE", 2.0)
    async with connected() as (qmp, peer, _):
        for name in ("one", "two"):
            answered = asyncio.ensure_future(qmp.execute(name))
            await peer.answer(**{"return": {}})
            await answered
        await asyncio.sleep(2.5)        # longer than the patience: each answer has ended its own
        answered = asyncio.ensure_future(qmp.execute("three"))
        await peer.answer(**{"return": {}})
        assert await answered == {}
