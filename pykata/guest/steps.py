"""Runs the programs of a build: their output goes to a log, line by line, and into the error if one fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pykata.errors import BundleBuildError, ToolMissingError
from pykata.host import KILL, NO_ENV, PIPE, STDOUT, HostProcess, describe_exit, run_tool, spawn

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


async def run_quiet(argv: Sequence[str | Path]) -> str:
    """Run a short program and return what it wrote."""
    return (await run_tool(argv, env={**os.environ, "LC_ALL": "C"})).decode(errors="replace")


async def run_logged(
    argv: Sequence[str | Path],
    log: Path,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] = NO_ENV,
    on_line: Callable[[str], None] = lambda line: None,
) -> None:
    """Run a long program; its output is appended to ``log`` and given to ``on_line``."""
    everything = {**os.environ, "LC_ALL": "C", **env}
    with log.open("a") as file:
        async with spawn(argv, stdout=PIPE, stderr=STDOUT, cwd=cwd, env=everything, kill=KILL) as process:
            async for line in _lines(process):
                file.write(line + "\n")
                on_line(line)
            status = await process.wait()
    if status:
        raise BundleBuildError(f"{Path(argv[0]).name} {describe_exit(status)}", output=tail(log))


async def _lines(process: HostProcess) -> AsyncIterator[str]:
    assert process.stdout is not None
    rest = b""
    async for data in process.stdout:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def tail(log: Path) -> str:
    """The end of a log, from its first error if that is near."""
    text = log.read_text(errors="replace")[-_TAIL:]
    return text[max(text.find("error:") - 500, 0) :]


def count_lines(prefixes: Iterable[str], step: str, total: int, progress: Progress) -> Callable[[str], None]:
    """An ``on_line`` that reports the lines with one of these prefixes as ``done`` of ``total``."""
    known, seen = tuple(prefixes), 0

    def on_line(line: str) -> None:
        nonlocal seen
        if line.startswith(known):
            seen += 1
            progress(step, min(seen, total), total, line.strip())

    return on_line
