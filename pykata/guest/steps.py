"""Runs the programs of a build: their output goes to a log, line by line, and into the error if one fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from pykata.errors import BundleBuildError, ToolMissingError

Progress = Callable[[str, int, int, str], None]
"""Called with the step's name, how much is done, of how much (0: unknown), and a line of text."""

_TAIL = 4000


def no_progress(step: str, done: int, total: int, text: str) -> None:
    """For those who don't want to know."""


def need_tools(tools: Mapping[str, str]) -> None:
    """Fail unless all of ``tools`` (program -> Debian package) are installed; the hint installs them."""
    missing = sorted({package for program, package in tools.items() if shutil.which(program) is None})
    programs = ", ".join(program for program in tools if shutil.which(program) is None)
    if missing:
        raise ToolMissingError(f"not installed: {programs}", hint=f"apt-get install {' '.join(missing)}")


async def run_quiet(argv: Sequence[str], *, stdin: bytes | None = None, pass_fds: Sequence[int] = ()) -> str:
    """Run a short program and return what it wrote."""
    try:
        done = await anyio.run_process(argv, input=stdin, stderr=subprocess.STDOUT, check=False, pass_fds=pass_fds)
    except FileNotFoundError as exc:
        raise ToolMissingError(f"not installed: {argv[0]}") from exc
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        raise BundleBuildError(f"{argv[0]} ended with {done.returncode}", output=output[-_TAIL:])
    return output


async def run_logged(
    argv: Sequence[str],
    log: Path,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> None:
    """Run a long program; its output is appended to ``log`` and given to ``on_line``."""
    with log.open("a") as file:
        async with _group(argv, cwd, {**os.environ, "LC_ALL": "C", **(env or {})}) as process:
            async for line in _lines(process):
                file.write(line + "\n")
                on_line(line)
            status = await process.wait()
    if status:
        raise BundleBuildError(f"{argv[0]} ended with {status}; see {log}", output=tail(log))


@asynccontextmanager
async def _group(argv: Sequence[str], cwd: Path | None, env: Mapping[str, str]) -> AsyncIterator[Process]:
    process = await anyio.open_process(
        argv, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd=cwd, env=env, start_new_session=True
    )
    try:
        yield process
    finally:
        # `make` and `cargo` have children of their own: the whole group goes.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        with anyio.CancelScope(shield=True):
            await process.aclose()


async def _lines(process: Process) -> AsyncIterator[str]:
    assert process.stdout is not None
    rest = ""
    async for text in TextReceiveStream(process.stdout, errors="replace"):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def tail(log: Path) -> str:
    """The end of a log, from its first error if that is near."""
    text = log.read_text(errors="replace")[-_TAIL:]
    return text[max(text.find("error:") - 500, 0):]


def count_lines(prefixes: Iterable[str], step: str, total: int, progress: Progress) -> Callable[[str], None]:
    """An ``on_line`` that reports the lines with one of these prefixes as ``done`` of ``total``."""
    known, seen = tuple(prefixes), 0

    def on_line(line: str) -> None:
        nonlocal seen
        if line.startswith(known):
            seen += 1
            progress(step, min(seen, total), total, line.strip())

    return on_line
