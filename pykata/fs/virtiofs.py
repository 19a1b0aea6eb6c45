"""Directories and files of the host behind a virtio-fs device, served by a virtiofsd in a user namespace."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import anyio

from pykata import host
from pykata.errors import HostError, last_line, printable
from pykata.spec import VOLUMES, Attachment, Mount, Shared, VhostFs

ENTER = Path(__file__).with_name("enter.py")


def daemon() -> Path:
    """The virtiofsd of this host: QEMU's, or the one written in Rust. Raises ToolMissingError."""
    return host.find_tool("virtiofsd", package="virtiofsd", env_var="PYKATA_VIRTIOFSD")


@asynccontextmanager
async def served(tag: str, shares: Sequence[Shared], cache: str, run_dir: Path) -> AsyncIterator[Attachment]:
    """A virtio-fs device ``tag`` with all of ``shares`` side by side, mounted below :data:`~pykata.spec.VOLUMES`.

    Its daemon runs as long as the block; :attr:`~pykata.spec.Attachment.lost` tells if it doesn't. Raises
    :class:`~pykata.errors.HostError`.
    """
    program = daemon()
    async with AsyncExitStack() as stack:
        root = run_dir / tag
        root.mkdir()
        listener, connection = _connected(run_dir / f"{tag}.sock")
        stack.callback(connection.close)
        with listener:
            command = [sys.executable, "-I", "-S", str(ENTER), _plan(root, shares), str(program),
                       *_options(listener.fileno(), root, cache)]
            process = await stack.enter_async_context(host.spawn(
                command, stderr=host.PIPE, pass_fds=(listener.fileno(),), cwd=Path("/"), env=host.TOOL_ENV,
                kill=host.KILL))  # fmt: skip
        said = _Said(process)
        stack.push_async_callback(said.stop)
        yield Attachment(
            devices=(VhostFs(tag, connection),),
            mounts=(Mount(tag, "virtiofs", f"{VOLUMES}/{tag}", ("nosuid", "nodev")),),
            lost=(said.ended,),
        )


def _connected(path: Path) -> tuple[socket.socket, socket.socket]:
    """A listening socket for the daemon, and our connection to it, which waits there. No name of it is left."""
    listener, connection = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    try:
        # A socket's path has at most 107 bytes (unix(7)), and a directory's descriptor makes any path short.
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            short = f"/proc/self/fd/{directory}/{path.name}"
            listener.bind(short)
            listener.listen(1)
            connection.connect(short)
        finally:
            os.close(directory)
        path.unlink()
    except OSError as exc:
        listener.close()
        connection.close()
        raise HostError(f"can't make a socket for virtiofsd: {exc}") from exc
    return listener, connection


def _plan(root: Path, shares: Sequence[Shared]) -> str:
    return json.dumps({
        "root": str(root),
        "shares": [
            (share.name, os.fsdecode(share.path), "ro" if share.readonly else "rw",
             "dir" if share.path.is_dir() else "file")
            for share in shares
        ],
    })  # fmt: skip


def _options(listener: int, root: Path, cache: str) -> list[str]:
    """Those of QEMU's virtiofsd; the one in Rust takes them, too. Sandbox and seccomp filter are on by default."""
    return [
        f"--fd={listener}", "-f",
        # -o takes a comma for its own, and no name of the user's is among these.
        "-o", f"source={root}",
        "-o", f"cache={cache}",
        "-o", "sandbox=namespace",
        # Each share is a filesystem of its own in the guest, too: or files of two could look like one.
        "-o", "announce_submounts",
        "-o", "xattr",
        "-o", "log_level=warn",
        "--rlimit-nofile=0",        # enter.py has set it
    ]  # fmt: skip


class _Said:
    """What a daemon says last, read all the time: a full pipe would stall it."""

    def __init__(self, process: host.HostProcess) -> None:
        self._process = process
        self._tail = bytearray()
        self._reader = asyncio.ensure_future(self._follow())

    async def _follow(self) -> None:
        assert self._process.stderr is not None
        with suppress(anyio.EndOfStream, anyio.ClosedResourceError, OSError):
            while True:
                self._tail += await self._process.stderr.receive()
                del self._tail[:-host.TAIL]

    async def ended(self) -> str:
        """Wait until the daemon has ended; says how."""
        code = await self._process.wait()
        with anyio.move_on_after(1):
            await asyncio.wait({self._reader})
        how = f"virtiofsd {host.describe_exit(code)}"
        words = last_line(self._tail.decode(errors="backslashreplace"))
        return f"{how}: {printable(words.encode())}" if words else how

    async def stop(self) -> None:
        self._reader.cancel()
        await host.finish(_over(self._reader))


async def _over(task: asyncio.Future[None]) -> None:
    await asyncio.wait({task})
