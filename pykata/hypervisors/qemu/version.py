"""Which QEMU is it?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pykata.errors import ToolFailedError, ToolTooOldError
from pykata.host import run_tool

OLDEST = (7, 2)
"""The oldest version that we run and test: Debian 12's."""


def of_greeting(greeting: Mapping[str, object]) -> tuple[int, int, int]:
    """The version in QEMU's greeting (qmp-spec, "Server Greeting"): asking costs no process of its own."""
    match greeting:
        case {"QMP": {"version": {"qemu": {"major": int(major), "minor": int(minor), "micro": int(micro)}}}}:
            return major, minor, micro
    raise ToolFailedError("QEMU's greeting doesn't name its version")


async def of_binary(binary: Path) -> tuple[int, int, int]:
    """The version that the program prints. 20 ms, so only for a QEMU that ended before it could greet us."""
    try:
        said = await run_tool([binary, "--version"], timeout=10)
    except ToolFailedError as exc:
        raise ToolFailedError(f"{binary} is no QEMU that works", output=exc.output) from exc
    found = re.search(rb"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?", said)
    if found is None:
        raise ToolFailedError(f"{binary} is no QEMU", output=said.decode(errors="backslashreplace"))
    return int(found[1]), int(found[2]), int(found[3] or 0)


def check(version: tuple[int, ...], binary: Path) -> None:
    """Raise :class:`~pykata.errors.ToolTooOldError` for a version older than :data:`OLDEST`."""
    if version < OLDEST:
        raise ToolTooOldError(f"{binary} is QEMU {_text(version)}", hint=f"QEMU {_text(OLDEST)} or later is needed")


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
