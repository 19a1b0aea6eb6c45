"""Which QEMU is it?"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pykata.errors import ToolFailedError, ToolTooOldError
from pykata.host import run_tool

# An ELF note: the sizes of name and content, type NT_GNU_BUILD_ID, the name.
BUILD_ID = re.compile(rb"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0(.{20})", re.DOTALL)
SCRIPT = b"#!"
STARTED = re.compile(rb"""/[^\s"'=]*/[^\s"'/=]*qemu-system-[^\s"'/=]*""")
HEAD = 64 * 1024        # bytes; the note is among the first ones of a program
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


def program(binary: Path) -> Path:
    """The QEMU that ``binary`` starts where it is a script, as some packages have it; else ``binary`` itself."""
    return _program(*_stamped(binary))


def build(binary: Path) -> str:
    """What tells this build of QEMU from any other: the linker's build id (elf(5)), else a hash of the program.

    A script is told by what it says, and by what it starts.
    """
    started = program(binary)
    own = _build(*_stamped(binary))
    return own if started == binary else f"{own}-{_build(*_stamped(started))}"


def _stamped(binary: Path) -> tuple[Path, int, int]:
    found = binary.stat()
    return binary, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _program(binary: Path, size: int, changed: int) -> Path:
    with binary.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(SCRIPT):
        for name in STARTED.findall(head):
            if (path := Path(os.fsdecode(name))) != binary and path.is_file():
                return path
    return binary


@functools.lru_cache(maxsize=8)
def _build(binary: Path, size: int, changed: int) -> str:
    with binary.open("rb") as file:
        if found := BUILD_ID.search(file.read(HEAD)):
            return found[1].hex()
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(version: tuple[int, ...], binary: Path) -> None:
    """Raise :class:`~pykata.errors.ToolTooOldError` for a version older than :data:`OLDEST`."""
    if version < OLDEST:
        raise ToolTooOldError(f"{binary} is QEMU {text(version)}", hint=f"QEMU {text(OLDEST)} or later is needed")


def text(version: tuple[int, ...]) -> str:
    """As people write it."""
    return ".".join(map(str, version))
