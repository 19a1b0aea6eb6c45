"""Running a program of the host to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import anyio

from pykata.errors import ToolFailedError
from pykata.host.pipes import PipeReader, PipeWriter
from pykata.host.process import DEVNULL, PIPE, TOOL_ENV, describe_exit, spawn

TAIL = 16 * 1024                # bytes of a program's stderr that are kept for an error


async def run_tool(
    argv: Sequence[str | Path],
    *,
    input: bytes | None = None,
    timeout: float | None = None,
    env: Mapping[str, str] = TOOL_ENV,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    limit: int = 16 * 1024 * 1024,
) -> bytes:
    """Run a program to its end and return what it wrote to stdout, at most ``limit`` bytes.

    Raises :class:`~pykata.errors.ToolFailedError` with the tail of stderr if it ends with another code than 0, writes
    more, or takes longer than ``timeout`` seconds.
    """
    name = Path(argv[0]).name
    out, err = bytearray(), bytearray()

    def failed(why: str) -> ToolFailedError:
        return ToolFailedError(f"{name} {why}", output=bytes(err or out)[-TAIL:].decode(errors="backslashreplace"))

    async def feed(stream: PipeWriter, data: bytes) -> None:
        async with stream:
            with suppress(anyio.BrokenResourceError):       # it doesn't want all of it; its exit code tells
                await stream.send(data)

    async def collect(stream: PipeReader, into: bytearray, most: int) -> None:
        async for chunk in stream:
            into += chunk
            if into is out and len(into) > most:
                scope.cancel()
                return
            del into[:-most]

    stdin = DEVNULL if input is None else PIPE
    async with spawn(argv, stdin=stdin, stdout=PIPE, stderr=PIPE, env=env, cwd=cwd, pass_fds=pass_fds) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        with anyio.move_on_after(timeout) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(collect, process.stdout, out, limit)
                tasks.start_soon(collect, process.stderr, err, TAIL)
                if process.stdin is not None and input is not None:
                    tasks.start_soon(feed, process.stdin, input)
            await process.wait()
    if len(out) > limit:
        raise failed(f"wrote more than {limit} bytes")
    if scope.cancelled_caught:
        raise failed(f"took longer than {timeout} s")
    if process.returncode:
        raise failed(describe_exit(process.returncode))
    return bytes(out)
