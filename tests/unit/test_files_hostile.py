"""A guest that lies about its files: each lie is a typed error, and none costs memory or time without bound."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykata import AgentProtocolError, Container, FileError, PykataError, Sandbox, UnsafeTreeError
from pykata.files import v1
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess
from tests.images_fixtures import file, symlink, tar_of

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"
ATTRIBUTES = v1.Attributes(mode=0o100644, size=10)

Act = Callable[[FakeProcess], Awaitable[int]]


@asynccontextmanager
async def lying(act: Act) -> AsyncIterator[Container]:
    async with Sandbox(FakeHypervisor(tool=act), FakeFs()) as sb, sb.container(BUSYBOX) as container:
        yield container


def frame(response: v1.Response) -> bytes:
    data = bytes(response)
    return len(data).to_bytes(4) + data


def says(*said: bytes | v1.Response, code: int = 0, complaint: bytes = b"", ends: bool = True) -> Act:
    """A tool that answers every request with this."""

    async def act(process: FakeProcess) -> int:
        while await process.read():
            for each in said:
                await process.write(each if isinstance(each, bytes) else frame(each))
            if ends:
                await process.write_error(complaint) if complaint else None
                return code
        return 0

    return act


STAT = v1.Response(attributes=ATTRIBUTES)
DONE = v1.Response(done=v1.Done())


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff\xff\xff", b"\0\0\0\x05abcde", b"\0\0\0\0", DONE, v1.Response(entries=v1.Entries(last=True)),
        b"\0\x20\0\x01" + bytes(100),
    ],
)  # fmt: skip
async def test_answers_that_are_none(answer: bytes | v1.Response) -> None:
    async with lying(says(answer)) as box:
        with pytest.raises(AgentProtocolError):
            await box.files.stat("/f")


@pytest.mark.parametrize(
    "message",
    [
        b"\x0a\x02\x18\x05", b"\x0a\x02\x10\x05", b"\x0a\x03\x0a\x01x", b"\x1a\x03\x0a\x01x", b"\x08\x01",
        b"\x1a\x02\x40\x01", b"\x22\x04\x0a\x02\x40\x01", b"\x22\x02\x08\x01", b"\x2a\x02\x08\x01",
    ],
)  # fmt: skip
async def test_values_of_another_type(message: bytes) -> None:
    async with lying(says(len(message).to_bytes(4) + message)) as box:
        with pytest.raises(AgentProtocolError):
            await box.files.stat("/f")


@pytest.mark.parametrize("answer", [b"", b"\0\0", frame(STAT)[:-1]])
async def test_answers_that_stop(answer: bytes) -> None:
    async with lying(says(answer, code=1)) as box:
        with pytest.raises(FileError, match="ended") as caught:
            await box.files.stat("/f")
        assert caught.value.errno == errno.EIO


async def test_a_good_answer() -> None:
    async with lying(says(STAT, ends=False)) as box:
        for _ in range(3):
            assert (await box.files.stat("/f")).size == 10


@pytest.mark.parametrize(
    "failure",
    [
        v1.Failure(errno=-5, step="x\n\x1b[31m", path=b"\n\xff" * 5000), v1.Failure(errno=10**9), v1.Failure(),
        v1.Failure(errno=2, step="s" * 100_000),
    ],
)  # fmt: skip
async def test_failures_that_cannot_be(failure: v1.Failure) -> None:
    async with lying(says(v1.Response(failure=failure), ends=False)) as box:
        with pytest.raises(FileError) as caught:
            await box.files.read_bytes("/f")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("number", "step", "hint"),
    [
        (errno.EINVAL, "read at once what isn't a regular file", "stream"), (errno.EINVAL, "rename", ""),
        (errno.ENOSPC, "watch", "watches"), (errno.ENOSPC, "write", "disk="), (errno.EXDEV, "rename", "copy"),
    ],
)  # fmt: skip
async def test_hints_fit_what_was_tried(number: int, step: str, hint: str) -> None:
    async with lying(says(v1.Response(failure=v1.Failure(errno=number, step=step)), ends=False)) as box:
        with pytest.raises(FileError) as caught:
            await box.files.remove("/f")
        assert hint in caught.value.hint
        assert bool(hint) == bool(caught.value.hint)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0b", b"x" * 5000])
async def test_names_that_lead_out_of_a_directory(name: bytes) -> None:
    entries = v1.Entries(entries=[v1.Attributes(name=name, mode=0o40755)], last=True)
    async with lying(says(v1.Response(entries=entries))) as box:
        with pytest.raises(AgentProtocolError, match="name"):
            [each async for each in box.files.walk("/")]


async def test_an_endless_list() -> None:
    batch = frame(v1.Response(entries=v1.Entries(entries=[v1.Attributes(name=b"x", mode=0o100644)] * 100)))

    async def endless(process: FakeProcess) -> int:
        while True:
            await process.write(batch)

    async with lying(endless) as box:
        with pytest.raises(FileError, match="more than 1000 entries"):
            await box.files.list("/", limit=1000)


async def test_empty_batches_for_ever() -> None:
    async with lying(says(v1.Response(entries=v1.Entries()))) as box:
        with pytest.raises(AgentProtocolError):
            await box.files.list("/")


async def test_an_endless_file() -> None:
    async def either(process: FakeProcess) -> int:
        while request := v1.Request.parse((await process.read())[4:]).read:
            if request.bulk:
                await process.write(frame(STAT))
                while True:
                    await process.write(bytes(60_000))
            await process.write(frame(v1.Response(content=v1.Content(large=True))))
        return 0

    async with lying(either) as box:
        with pytest.raises(FileError, match="more than 1000000 bytes"):
            await box.files.read_bytes("/f", limit=1_000_000)
        assert len(await box.files.read_bytes("/f", size=500_000)) == 500_000


async def test_more_than_was_asked_for() -> None:
    async with lying(says(v1.Response(content=v1.Content(data=bytes(100))), ends=False)) as box:
        assert await box.files.read_bytes("/f", size=10) == bytes(10)


@pytest.mark.parametrize("code", [1, 3, 4, 137])
async def test_a_file_that_stops_in_the_middle(code: int) -> None:
    async with lying(says(STAT, b"half", code=code)) as box, box.files.open("/f") as file:
        assert await file.read(4) == b"half"
        with pytest.raises(FileError, match="ended"):
            await file.read()


async def test_a_file_that_fails_in_the_middle() -> None:
    complaint = frame(v1.Response(failure=v1.Failure(errno=errno.EIO, step="read")))
    async with lying(says(STAT, b"half", code=4, complaint=complaint)) as box, box.files.open("/f") as file:
        with pytest.raises(FileError, match="can't read '/f'"):
            await file.read()


async def test_complaints_without_end() -> None:
    async def endless(process: FakeProcess) -> int:
        await process.read()
        await process.write(frame(STAT))
        while True:
            await process.write_error(bytes(60_000))

    async with lying(endless) as box, box.files.open("/f") as file:
        with pytest.raises(AgentProtocolError, match="complained"):
            await file.read()


async def test_a_write_that_nobody_takes() -> None:
    async with lying(says(STAT, v1.Response(failure=v1.Failure(errno=errno.ENOSPC, step="write")))) as box:
        with pytest.raises(FileError, match="disk="):
            await box.files.write_bytes("/f", bytes(3_000_000))


async def test_a_guest_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(process: FakeProcess) -> int:
        await anyio.sleep_forever()
        return 0

    async with lying(silent) as box:
        for _ in range(3):
            with anyio.move_on_after(0.02) as scope:
                await box.files.stat("/f")
            assert scope.cancelled_caught


async def test_a_download_that_is_hostile(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    tar = tar_of([symlink("l", "../outside"), file("l/new", b"x")])

    async def act(process: FakeProcess) -> int:
        request = v1.Request.parse((await process.read())[4:])
        if request.stat is not None:
            await process.write(frame(v1.Response(attributes=v1.Attributes(mode=0o40755))))
            await process.read()
            return 0
        await process.write(frame(DONE))
        await process.write(tar)
        return 0

    async with lying(act) as box:
        with pytest.raises(UnsafeTreeError, match="leads through"):
            await box.files.download("/d", tmp_path / "target")
    assert list((tmp_path / "outside").iterdir()) == []


ANSWERS = st.one_of(
    st.binary(max_size=200), st.binary(max_size=200).map(lambda data: len(data).to_bytes(4) + data),
    st.sampled_from([frame(STAT), frame(DONE), frame(v1.Response(content=v1.Content(large=True)))]),
)  # fmt: skip
OPERATIONS: list[Callable[[Container, Path], Awaitable[Any]]] = [
    lambda box, path: box.files.read_bytes("/f", limit=1000),
    lambda box, path: box.files.list("/f", limit=10),
    lambda box, path: box.files.write_bytes("/f", bytes(600_000)),
    lambda box, path: box.files.download("/f", path, max_size=1000, max_entries=10),
    lambda box, path: box.files.remove("/f", recursive=True),
]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(answers=st.lists(ANSWERS, max_size=4), code=st.integers(0, 5), which=st.sampled_from(OPERATIONS))
async def test_any_answers(
    tmp_path_factory: pytest.TempPathFactory, answers: list[bytes], code: int,
    which: Callable[[Container, Path], Awaitable[Any]],
) -> None:  # fmt: skip
    async with lying(says(*answers, code=code)) as box:
        with anyio.fail_after(300), suppress(PykataError):
            await which(box, tmp_path_factory.mktemp("any") / "target")
