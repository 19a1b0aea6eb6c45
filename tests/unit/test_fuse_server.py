"""The file server for a guest's FUSE: what a guest's kernel asks, what it could ask, and trees that misbehave."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import struct
import sys
import threading
import zipfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.zip import ZipFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from pykata.fs.fsspec_tree import FsspecTree
from pykata.fs.fuse.nodes import Nodes
from pykata.fs.fuse.operations import Session
from pykata.fs.fuse.server import Server
from pykata.fs.fuse.tree import Tree
from pykata.fs.fuse.wire import ANSWER, DATA, LONGEST, REQUEST, Inbox, MalformedError, Op, Request
from pykata.fs.fuse.workers import Workers
from pykata.fs.quota import Quota
from tests.unit.memory_tree import Memory, memory


class Peer:
    """The guest's side of a conversation."""

    def __init__(self, tree: Tree, timeout: float = 5.0) -> None:
        self.server = Server(tree, timeout)
        self.to_server: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.from_server: asyncio.Queue[bytes] = asyncio.Queue()
        self.receive, self.send = self.to_server.get, self.from_server.put
        self._unique = 0

    async def ask(self, op: int, node: int, body: bytes = b"") -> bytes:
        """The body of the answer. Raises OSError."""
        self._unique += 2
        raw = REQUEST.pack(REQUEST.size + len(body), op, self._unique, node, 0, 0, 1, 0, 0) + body
        await self.to_server.put(raw[:50])      # it comes in pieces
        await self.to_server.put(raw[50:])
        data = await self.from_server.get()
        size, error, unique = ANSWER.unpack_from(data)
        assert (size, unique) == (len(data), self._unique)
        if error:
            raise OSError(-error, "from the server")
        return data[ANSWER.size:]

    async def walk(self, path: str) -> int:
        """The node at a path."""
        node = 1
        for name in path.split("/") if path else ():
            (node,) = struct.unpack_from("<Q", await self.ask(Op.LOOKUP, node, name.encode() + b"\0"))
        return node

    async def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        body = await self.ask(Op.OPEN, await self.walk(path), struct.pack("<II", flags, 0))
        return int(struct.unpack_from("<Q", body)[0])

    async def read(self, path: str, size: int = 1 << 20, offset: int = 0) -> bytes:
        handle = await self.open(path)
        try:
            return await self.ask(Op.READ, 1, struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0))
        finally:
            await self.release(handle)

    async def create(self, path: str, flags: int = os.O_RDWR) -> int:
        """The handle of a new file."""
        parent, _, name = path.rpartition("/")
        body = struct.pack("<IIII", flags, 0o644, 0, 0) + name.encode() + b"\0"
        made = await self.ask(Op.CREATE, await self.walk(parent), body)
        return int(struct.unpack_from("<Q", made, 128)[0])

    async def write(self, handle: int, data: bytes, offset: int = 0) -> None:
        body = struct.pack("<QQIIQII", handle, offset, len(data), 0, 0, 0, 0) + data
        assert await self.ask(Op.WRITE, 1, body) == struct.pack("<II", len(data), 0)

    async def flush(self, handle: int) -> None:
        await self.ask(Op.FLUSH, 1, struct.pack("<QIIQ", handle, 0, 0, 0))

    async def release(self, handle: int) -> None:
        await self.ask(Op.RELEASE, 1, struct.pack("<QIIQ", handle, 0, 0, 0))

    async def by_name(self, op: int, path: str, before: bytes = b"") -> bytes:
        parent, _, name = path.rpartition("/")
        return await self.ask(op, await self.walk(parent), before + name.encode() + b"\0")

    async def mkdir(self, path: str) -> None:
        await self.by_name(Op.MKDIR, path, bytes(8))

    async def rename(self, old: str, new: str) -> None:
        (from_, _, a), (to, _, b) = old.rpartition("/"), new.rpartition("/")
        names = a.encode() + b"\0" + b.encode() + b"\0"
        await self.ask(Op.RENAME, await self.walk(from_), struct.pack("<Q", await self.walk(to)) + names)

    async def list(self, path: str, room: int = 128) -> list[str]:
        node = await self.walk(path)
        (handle,) = struct.unpack_from("<Q", await self.ask(Op.OPENDIR, node, bytes(8)))
        found, offset = list[str](), 0
        while entries := await self.ask(Op.READDIR, node, struct.pack("<QQIIQII", handle, offset, room, 0, 0, 0, 0)):
            at = 0
            while at < len(entries):
                _, offset, length, _ = struct.unpack_from("<QQII", entries, at)
                found.append(entries[at + 24:at + 24 + length].decode())
                at += (24 + length + 7) // 8 * 8
        await self.release(handle)
        return sorted(found)


def said(error: pytest.ExceptionInfo[OSError]) -> int | None:
    return error.value.errno


@asynccontextmanager
async def peer(tree: Tree, timeout: float = 5.0) -> AsyncIterator[Peer]:
    made = Peer(tree, timeout)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(made.server.serve, made.receive, made.send)
        body = await made.ask(Op.INIT, 0, struct.pack("<IIII", 7, 41, 1 << 17, 2**32 - 1) + bytes(48))
        assert len(body) == 64
        yield made
        await made.to_server.put(None)


async def test_reading() -> None:
    _, tree = memory()
    async with peer(tree) as guest:
        assert await guest.list("") == ["a", "d"]
        assert await guest.list("d") == ["b"]
        assert await guest.read("a") == b"content"
        assert await guest.read("a", size=3, offset=2) == b"nte"
        assert await guest.read("a", offset=100) == b""
        assert await guest.read("d/b") == b"below"
        for path in ("nothing", "d/nothing"):
            with pytest.raises(FileNotFoundError):
                await guest.read(path)
        for path in ("..", "d/..", "../other", "."):
            with pytest.raises(OSError, match="from the server") as caught:
                await guest.walk(path)
            assert said(caught) == errno.EINVAL
        with pytest.raises(OSError, match="from the server") as caught:
            await guest.ask(Op.GETATTR, 77, bytes(16))
        assert said(caught) == errno.ESTALE
        with pytest.raises(OSError, match="from the server") as caught:
            await guest.ask(Op.READ, 1, struct.pack("<QQIIQII", 77, 0, 1, 0, 0, 0, 0))
        assert said(caught) == errno.EBADF


async def test_a_file_whose_size_nobody_knows_is_read_to_its_end() -> None:
    class Stream(io.BytesIO):
        def seek(self, *args: int) -> int:
            raise OSError(errno.ESPIPE, "a stream")

        def tell(self) -> int:
            return 0

    class Unsized(Memory):
        strange: float | None   # as its size and as its time

        def info(self, path: str, **more: Any) -> dict[str, Any]:
            found = super().info(path, **more)
            strange = {"size": self.strange, "mtime": self.strange or datetime.min}
            return found if found["type"] == "directory" else {**found, **strange}

        def ls(self, path: str, detail: bool = True, **more: Any) -> list[Any]:
            return [self.info(entry["name"]) for entry in super().ls(path, detail=True, **more)]

        def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
            return super()._open(path, mode, **more) if "w" in mode else Stream(self.store[path].getvalue())

    fs = Unsized()
    for fs.strange in (None, float("inf"), float("nan"), -1, -(10**400)):
        fs.pipe({"/top/a": b"content" * 1000})
        async with peer(FsspecTree(fs, "/top", readonly=True, buffer=1 << 20)) as guest:
            assert await guest.list("") == ["a"]
            opened = await guest.ask(Op.OPEN, await guest.walk("a"), struct.pack("<II", os.O_RDONLY, 0))
            handle, flags, _ = struct.unpack("<QII", opened)
            assert flags == 1, "FOPEN_DIRECT_IO: the guest's kernel would read nothing of it"
            read = b""
            while piece := await guest.ask(Op.READ, 1, struct.pack("<QQIIQII", handle, len(read), 999, 0, 0, 0, 0)):
                read += piece
            assert read == b"content" * 1000
            await guest.release(handle)


async def test_a_volume_of_a_file_is_no_empty_directory() -> None:
    fs, _ = memory()
    async with peer(FsspecTree(fs, "/top/a", readonly=True, buffer=0)) as guest:
        assert await refused(guest.list("")) == errno.ENOTDIR


async def test_a_long_directory_comes_in_pieces() -> None:
    fs, tree = memory()
    fs.pipe({f"/top/many/{number}{'x' * 100}": b"" for number in range(500)})
    async with peer(tree) as guest:
        assert len(set(await guest.list("many", room=4096))) == 500


async def test_writing_anywhere_is_handed_over_as_a_whole() -> None:
    fs, tree = memory()
    async with peer(tree) as guest:
        new = await guest.create("new")
        await guest.write(new, b"world", offset=6)
        await guest.write(new, b"hello ")
        assert fs.cat_file("/top/new") == b""
        await guest.flush(new)
        assert fs.cat_file("/top/new") == b"hello world"
        await guest.write(new, b"!", offset=20)
        assert await guest.read("new") == b"hello world\0\0\0\0\0\0\0\0\0!", "who reads it sees it already"
        await guest.release(new)
        assert fs.cat_file("/top/new") == b"hello world\0\0\0\0\0\0\0\0\0!"
        size = struct.pack("<IIQQ", 8, 0, 0, 4) + bytes(64)
        await guest.ask(Op.SETATTR, await guest.walk("a"), size)
        assert fs.cat_file("/top/a") == b"cont"
        await guest.release(await guest.open("a", os.O_WRONLY | os.O_TRUNC))
        assert fs.cat_file("/top/a") == b""
        with pytest.raises(PermissionError):
            await guest.ask(Op.SETATTR, await guest.walk("a"), struct.pack("<II", 1, 0) + bytes(80))


async def test_names() -> None:
    fs, tree = memory()
    async with peer(tree) as guest:
        await guest.mkdir("new")
        with pytest.raises(FileExistsError):
            await guest.mkdir("new")
        handle = await guest.create("new/f")
        node = await guest.walk("new/f")
        await guest.write(handle, b"1")
        await guest.rename("new", "moved")
        await guest.write(handle, b"2", offset=1)
        await guest.release(handle)
        assert fs.cat_file("/top/moved/f") == b"12", "who has it open goes on with it"
        assert await guest.walk("moved/f") == node, "it is the same file"
        with pytest.raises(OSError, match="from the server") as caught:
            await guest.by_name(Op.RMDIR, "moved")
        assert said(caught) == errno.ENOTEMPTY
        await guest.by_name(Op.UNLINK, "moved/f")
        await guest.by_name(Op.RMDIR, "moved")
        assert await guest.list("") == ["a", "d"]
        await guest.rename("a", "b")
        await guest.release(await guest.create("a"))
        await guest.rename("b", "a")
        assert fs.cat_file("/top/a") == b"content", "over another file"
        with pytest.raises(OSError, match="from the server") as caught:
            await guest.rename("d", "d/x")
        assert said(caught) == errno.EINVAL
        with pytest.raises(PermissionError):
            await guest.ask(Op.SYMLINK, 1, b"l\0/etc/passwd\0")


async def test_a_removed_file_stays_removed() -> None:
    fs, tree = memory()
    async with peer(tree) as guest:
        handle = await guest.create("f")
        node = await guest.walk("f")
        await guest.write(handle, b"x")
        await guest.by_name(Op.UNLINK, "f")
        await guest.write(handle, b"y", offset=1)
        attributes = await guest.ask(Op.GETATTR, node, struct.pack("<IIQ", 1, 0, handle))
        assert struct.unpack_from("<Q", attributes, 24) == (2,)
        await guest.release(handle)
    assert not fs.exists("/top/f")


async def test_what_is_open_at_the_end_is_handed_over() -> None:
    fs, tree = memory()
    async with peer(tree) as guest:
        await guest.write(await guest.create("f"), b"x")
    assert fs.cat_file("/top/f") == b"x"


@pytest.mark.parametrize("by", ["cancellation", "the guest's end"])
async def test_it_is_handed_over_however_often_the_conversation_is_cancelled_meanwhile(by: str) -> None:
    begun, release = threading.Event(), threading.Event()

    class Slow(Memory):
        def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
            if value:
                begun.set()
                release.wait()
            super().pipe_file(path, value, **more)

    fs = Slow()
    guest = Peer(FsspecTree(fs, "", readonly=False, buffer=1 << 20), timeout=600)
    serving = asyncio.create_task(guest.server.serve(guest.receive, guest.send))
    try:
        await guest.ask(Op.INIT, 0, struct.pack("<IIII", 7, 41, 1 << 17, 2**32 - 1) + bytes(48))
        await guest.write(await guest.create("f"), b"x")
        if by == "cancellation":
            serving.cancel()
        else:
            await guest.to_server.put(None)
        while not begun.is_set():
            await anyio.lowlevel.checkpoint()
        for _ in range(10):
            serving.cancel()
            await anyio.lowlevel.checkpoint()
        assert not serving.done(), "what was written is not handed over yet"
    finally:
        release.set()
    await asyncio.wait([serving])
    assert serving.cancelled()
    assert fs.cat_file("/f") == b"x"
    # And no thread waits for more: which every test is asked for.


async def test_read_only() -> None:
    fs, tree = memory(readonly=True)
    before = dict(fs.store)
    async with peer(tree) as guest:
        for attempt in (
            guest.create("f"), guest.open("a", os.O_RDWR), guest.open("a", os.O_TRUNC), guest.mkdir("x"),
            guest.by_name(Op.UNLINK, "a"), guest.rename("a", "b"),
            guest.by_name(Op.MKNOD, "x", struct.pack("<IIII", 0o100644, 0, 0, 0)),
        ):  # fmt: skip
            with pytest.raises(OSError, match="from the server") as caught:
                await attempt
            assert said(caught) == errno.EROFS
        assert await guest.read("a") == b"content"
    assert fs.store == before


async def test_the_buffer_is_a_limit() -> None:
    _, tree = memory(buffer=10_000)
    async with peer(tree) as guest:
        handle = await guest.create("f")
        await guest.write(handle, bytes(8000))
        with pytest.raises(OSError, match="from the server") as caught:
            await guest.write(handle, bytes(8000), offset=8000)
        assert said(caught) == errno.ENOSPC
        with pytest.raises(OSError, match="from the server"):
            await guest.write(handle, b"x", offset=2**62)
        await guest.release(handle)
        await guest.write(await guest.create("g"), bytes(9000))       # the room is there again


async def test_what_is_left_of_a_limit() -> None:
    async def left(guest: Peer) -> tuple[int, ...]:
        return struct.unpack_from("<QQQQQ", await guest.ask(Op.STATFS, 1))

    _, tree = memory(quota=Quota(size=81_920, files=3))
    async with peer(tree) as guest:
        assert await left(guest) == (20, 20, 20, 3, 3)
        handle = await guest.create("f")
        await guest.write(handle, bytes(40_960))
        await guest.release(handle)
        assert await left(guest) == (20, 10, 10, 3, 2)
        for name in ("f", "a"):             # which was there before
            await guest.by_name(Op.UNLINK, name)
        assert await left(guest) == (20, 20, 20, 4, 4)
        tree.quota.back(10**30)             # a filesystem said that of one that was removed
        assert await left(guest) == (2**50, 2**50, 2**50, 4, 4)
    async with peer(memory()[1]) as guest:
        assert set(await left(guest)) == {1 << 28}


async def refused(attempt: Awaitable[object]) -> int | None:
    with pytest.raises(OSError, match="from the server") as caught:
        await attempt
    return said(caught)


async def test_a_guest_adds_what_it_may() -> None:
    _, tree = memory(quota=Quota(size=10_000, files=2))
    async with peer(tree) as guest:
        handle = await guest.create("f")
        await guest.mkdir("x")
        assert await refused(guest.create("g")) == errno.ENOSPC
        assert await refused(guest.mkdir("y")) == errno.ENOSPC
        await guest.write(handle, bytes(10_000))
        assert await refused(guest.write(handle, b"x", offset=10_000)) == errno.ENOSPC
        await guest.write(handle, b"x", offset=9_999)       # no more than there was
        await guest.release(handle)
        for _ in range(3):                                  # what is written anew isn't added
            handle = await guest.open("f", os.O_RDWR | os.O_TRUNC)
            await guest.write(handle, bytes(10_000))
            await guest.release(handle)
        assert await refused(guest.write(await guest.open("a", os.O_RDWR), b"x", offset=7)) == errno.ENOSPC
        await guest.by_name(Op.UNLINK, "f")                 # and what is gone isn't there
        await guest.by_name(Op.UNLINK, "a")
        handle = await guest.create("g")
        await guest.write(handle, bytes(10_007))
        await guest.by_name(Op.UNLINK, "g")
        await guest.write(handle, bytes(20_000))
        await guest.release(handle)
        await guest.write(await guest.create("h"), bytes(10_007))
        await guest.by_name(Op.RMDIR, "x")
        await guest.mkdir("y")
        await guest.create("i")
        assert await refused(guest.create("j")) == errno.ENOSPC


async def test_other_filesystems(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("in/side", b"zipped" * 1000)
    async with peer(FsspecTree(ZipFileSystem(packed), readonly=True, buffer=0)) as guest:
        assert await guest.list("") == ["in"]
        assert await guest.read("in/side", offset=6, size=6) == b"zipped"
    local = FsspecTree(LocalFileSystem(), str(tmp_path), readonly=False, buffer=1 << 20)
    async with peer(local) as guest:
        handle = await guest.create("f")
        await guest.write(handle, b"x")
        await guest.release(handle)
        assert await guest.list("") == ["f"]
    assert (tmp_path / "f").read_bytes() == b"x"


class Broken:
    """A tree that does what its ``act`` does."""

    readonly = False

    def __init__(self, act: Any) -> None:
        self.act = act

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **more: self.act()


def failing(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(("error", "number"), [
    (FileNotFoundError(), errno.ENOENT), (PermissionError("no"), errno.EACCES),
    (OSError(errno.EDQUOT, "x"), errno.EDQUOT),
    (NotImplementedError(), errno.EOPNOTSUPP), (TimeoutError(), errno.ETIMEDOUT), (ValueError("x"), errno.EIO),
    (ZeroDivisionError(), errno.EIO), (OSError("no number"), errno.EIO), (OSError(-5, "x"), errno.EIO),
    (StopIteration(), errno.EIO), (asyncio.CancelledError(), errno.EIO), (SystemExit(3), errno.EIO),
    (KeyboardInterrupt(), errno.EIO), (BaseExceptionGroup("x", [GeneratorExit()]), errno.EIO),
])  # fmt: skip
async def test_a_tree_that_raises_fails_the_request(error: BaseException, number: int) -> None:
    tree: Any = Broken(failing(error))
    async with peer(tree) as guest:
        with pytest.raises(OSError, match="from the server") as caught:
            await guest.walk("a")
        assert said(caught) == number
        await guest.ask(Op.DESTROY, 1)


async def test_a_tree_that_hangs_fails_the_request() -> None:
    release = threading.Event()
    tree: Any = Broken(release.wait)
    try:
        async with peer(tree, timeout=1.0) as guest:
            with pytest.raises(OSError, match="from the server") as caught:
                await guest.walk("a")
            assert said(caught) == errno.ETIMEDOUT
            await guest.ask(Op.DESTROY, 1)
    finally:
        release.set()


HANGS = """
import anyio, threading
from pykata.fs.fuse.server import Server
from pykata.fs.fuse.wire import Op, REQUEST

class Hangs:
    readonly = False
    def stat(self, path):
        threading.Event().wait()

asked = [REQUEST.pack(42, Op.LOOKUP, 2, 1, 0, 0, 1, 0, 0) + b"a\\0", None]

async def main():
    answered = anyio.Event()
    async def receive():
        if len(asked) == 1:
            await answered.wait()
        return asked.pop(0)
    async def send(data):
        print(int.from_bytes(data[4:8], "little", signed=True), flush=True)
        answered.set()
    await Server(Hangs(), 0.1).serve(receive, send)

anyio.run(main)
print("ended", flush=True)
"""


async def test_a_thread_that_hangs_keeps_no_program_from_ending() -> None:
    done = await anyio.run_process([sys.executable, "-c", HANGS], env={"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout.split() == [str(-errno.ETIMEDOUT).encode(), b"ended"]


async def test_what_cant_be_handed_over_at_the_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    class Slow(Memory):
        def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
            if value:
                release.wait()
            super().pipe_file(path, value, **more)

    fs = Slow()
    try:
        async with peer(FsspecTree(fs, "", readonly=False, buffer=1 << 20)) as guest:
            await guest.write(await guest.create("f"), b"x")
            guest.server._timeout = 0.1
    finally:
        release.set()
    assert "what was written last to a volume may be lost" in caplog.text


def test_threads_end_with_what_they_are_for() -> None:
    workers, begun, release = Workers(), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        release.wait()

    async def work() -> None:
        task = asyncio.create_task(workers.run(hang))
        while not begun.is_set():
            await anyio.lowlevel.checkpoint()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert await workers.run(lambda: 42) == 42
        assert workers.busy == 1, "one is left behind"
        workers.close()

    asyncio.run(work())
    release.set()           # it finds neither its loop nor anything to do, and ends: which every test is asked for


def test_a_thread_that_could_not_be_started_is_not_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def work() -> None:
        workers = Workers()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", denied)
            with pytest.raises(RuntimeError, match="can't start"):
                await workers.run(lambda: 42)
        assert workers.busy == 0
        assert await workers.run(lambda: 42) == 42
        workers.close()

    asyncio.run(work())


# --- what no kernel would say ---


def test_requests_that_are_none() -> None:
    rest = (26, 1, 1, 0, 0, 0, 0, 0)
    for raw in (REQUEST.pack(39, *rest), REQUEST.pack(LONGEST + 1, *rest), bytes(40)):
        inbox = Inbox()
        inbox.add(raw)
        with pytest.raises(MalformedError):
            inbox.take()


async def test_a_conversation_ends_with_what_is_no_request() -> None:
    made = Peer(memory()[1])
    await made.to_server.put(bytes(50))
    with pytest.raises(BaseExceptionGroup) as caught:
        await made.server.serve(made.receive, made.send)
    assert caught.group_contains(MalformedError)


@given(st.sampled_from(list(Op)) | st.integers(0, 255), st.integers(0, 3), st.binary(max_size=200))
@settings(max_examples=400, deadline=None)
def test_any_request_is_answered_or_refused(op: int, node: int, body: bytes) -> None:
    fs, tree = memory()
    session = Session(tree, 1.0)
    try:
        answer = session.do(Request(op, 2, node, body))
    except (OSError, MalformedError):
        return
    assert len(answer) <= DATA
    assert fs.cat_file("/other") == b"not for the guest"


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, int, bytes]:
    """A request with fields in the right places."""
    name = st.sampled_from([b"a", b"d", b"new", b"..", b".", b"", b"x/y", b"\xff", b"n" * 300]).map(lambda n: n + b"\0")
    number = st.sampled_from([0, 1, 2, 3, 7, 8, 64, 72, 2**31, 2**63, 2**64 - 1])
    u32, u64 = number.map(lambda n: struct.pack("<I", n % 2**32)), number.map(lambda n: struct.pack("<Q", n))
    node = st.integers(0, 5).map(lambda n: struct.pack("<Q", n))
    how = [node, u64, st.just(struct.pack("<I", 9)), bytes16]
    forms: dict[int, list[st.SearchStrategy[bytes]]] = {
        Op.LOOKUP: [name], Op.FORGET: [u64], Op.BATCH_FORGET: [u32, u32, node, u64], Op.OPEN: [u32, u32],
        Op.CREATE: [u32, u32, u32, u32, name], Op.READ: how, Op.WRITE: [*how, st.just(b"\0\0\0\0some data")],
        Op.FLUSH: [node], Op.RELEASE: [node], Op.OPENDIR: [u32, u32], Op.READDIR: how, Op.MKDIR: [u64, name],
        Op.UNLINK: [name], Op.RMDIR: [name], Op.RENAME: [node, name, name], Op.RENAME2: [node, u32, u32, name, name],
        Op.GETATTR: [u32, u32, node], Op.SETATTR: [u32, u32, node, u64, st.just(bytes(64))],
        Op.MKNOD: [st.just(struct.pack("<I", 0o100644)), bytes12, name],
    }  # fmt: skip
    op = draw(st.sampled_from(sorted(forms)))
    return op, draw(st.integers(0, 5)), b"".join(draw(part) for part in forms[op])


bytes12, bytes16 = st.just(bytes(12)), st.just(bytes(16))


@given(st.lists(requests(), max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_sequence_stays_below_the_root(sequence: list[tuple[int, int, bytes]]) -> None:
    fs, tree = memory(buffer=100_000)
    session = Session(tree, 1.0)
    for op, node, body in sequence:
        try:
            assert len(session.do(Request(op, 2, node, body))) <= DATA
        except (OSError, MalformedError):
            continue
    assert session.close() == []
    assert tree._room == 100_000, "all of the buffer is free again"
    assert not tree._nodes
    outside = [path for path in fs.store if not path.startswith("/top/")]
    assert outside == ["/other"]


def test_paths_are_limited() -> None:
    def made(node: int, name: bytes) -> int:
        body = session.do(Request(Op.MKDIR, 2, node, bytes(8) + name + b"\0"))
        return int(struct.unpack_from("<Q", body)[0])

    session = Session(memory()[1], 1.0)
    top = node = made(1, b"t")
    for _ in range(15):
        node = made(node, b"n" * 255)
    with pytest.raises(OSError, match="too long a path") as caught:
        made(node, b"n" * 255)
    assert said(caught) == errno.ENAMETOOLONG
    last = made(node, b"n" * 254)      # 4096 bytes with all the slashes
    long = b"t\0" + b"T" * 2 + b"\0"
    session.do(Request(Op.RENAME, 2, 1, struct.pack("<Q", 1) + long))
    with pytest.raises(OSError, match="no such file any more"):
        session.do(Request(Op.GETATTR, 2, last, bytes(16)))
    session.do(Request(Op.GETATTR, 2, node, bytes(16)))
    session.do(Request(Op.GETATTR, 2, top, bytes(16)))


def test_the_paths_that_are_known_are_limited_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykata.fs.fuse.nodes.MAX_SIZE", 4 * sys.getsizeof("d" * 100))
    nodes = Nodes()
    for turn in range(3):       # what is forgotten, wherever it is by then, takes no room
        numbers = [nodes.told("d" * 100)]
        numbers += [nodes.told(f"{'d' * 100}/{name}") for name in "ab"]
        with pytest.raises(OSError, match="too many files are known") as caught:
            nodes.told("c" * 100)
        assert said(caught) == errno.ENFILE
        nodes.moved("d" * 100, "e" * (90 if turn else 135))
        nodes.moved(f"{'d' * 100}/a", "f")
        nodes.removed(f"{'d' * 100}/b")
        for number in numbers:
            nodes.forget(number, 1)
        assert nodes._size == 0


def test_what_is_moved_to_where_there_is_no_room_is_known_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes()
    numbers = [nodes.told(path) for path in ("d", "d/a", "d/b")]
    monkeypatch.setattr("pykata.fs.fuse.nodes.MAX_SIZE", nodes._size + 60)
    nodes.moved("d", "e" * 30)
    assert [nodes.path(number) for number in numbers[:2]] == ["e" * 30, "e" * 30 + "/a"]
    with pytest.raises(OSError, match="no such file any more"):
        nodes.path(numbers[2])
    nodes.moved("e" * 30, "d")
    assert nodes.path(numbers[1]) == "d/a"


def test_what_is_known_and_open_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykata.fs.fuse.nodes.MAX_NODES", 2)
    monkeypatch.setattr("pykata.fs.fuse.nodes.MAX_OPEN", 2)
    session = Session(memory()[1], 1.0)
    session.do(Request(Op.LOOKUP, 2, 1, b"a\0"))
    with pytest.raises(OSError, match="too many files are known") as caught:
        session.do(Request(Op.LOOKUP, 2, 1, b"d\0"))
    assert said(caught) == errno.ENFILE
    session.do(Request(Op.FORGET, 2, 2, struct.pack("<Q", 1)))
    session.do(Request(Op.LOOKUP, 2, 1, b"d\0"))
    session.do(Request(Op.OPENDIR, 2, 1, bytes(8)))
    session.do(Request(Op.OPENDIR, 2, 1, bytes(8)))
    with pytest.raises(OSError, match="too many files are open"):
        session.do(Request(Op.OPENDIR, 2, 1, bytes(8)))
