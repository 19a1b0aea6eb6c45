"""A Debian machine under emulation with a working KVM and vhost-vsock of its own, to run pykata in.

QEMU's TCG emulates AMD's SVM with nested paging, so the kernel of the machine that it runs loads kvm-amd and has a
``/dev/kvm`` that boots ordinary kernels: slowly, but through the same code as on real hardware.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from attrs import frozen

from pykata.errors import printable
from pykata.guest import Bundle, find_bundle
from pykata.host import KILL, find_tool, run_tool, spawn
from tests.nested.image import PYTHON, Debian, debian, squash

ROOT = Path(__file__).resolve().parents[2]
CPUS = 2
MEMORY = 3072                   # MiB
BOOT_TIMEOUT = 240.0            # seconds; takes 15 on two idle cores
CONSOLE = 16 * 1024             # bytes of the console that an error shows
LINE = 1024 * 1024              # bytes that a message may have

ENVIRONMENT = {
    "PYTHONPATH": "/work:/work/adapters:/work/site-packages",
    "PYKATA_BUNDLE": "/work/bundle",
}  # fmt: skip
"""What programs find their libraries and the guest bundle by."""


@frozen
class Finished:
    """A program that has ended. ``output`` is what it wrote to stdout and stderr, in order."""

    code: int
    output: str


class MachineEndedError(Exception):
    """The nested machine ended, or said what can't be right."""


class Machine:
    """The nested machine, booted."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, console: Path) -> None:
        self._reader = reader
        self._writer = writer
        self._console = console
        self._ready: Mapping[str, Any] = {}

    @property
    def devices(self) -> Sequence[str]:
        """Which of /dev/kvm, /dev/vhost-vsock and /dev/vsock it has."""
        return tuple(self._ready["devices"])

    def console(self) -> str:
        """The end of what its kernel wrote."""
        return "\n".join(map(printable, self._console.read_bytes()[-CONSOLE:].splitlines()))

    async def run(self, *argv: str, env: Mapping[str, str] | None = None, timeout: float = 600.0) -> Finished:
        """Run a program in ``/work``, where this repository is; raises TimeoutError after ``timeout`` seconds."""
        said: list[str] = []
        environment = {**ENVIRONMENT, **(env or {})}
        self._writer.write(json.dumps({"argv": argv, "env": environment}).encode() + b"\n")
        try:
            with anyio.fail_after(timeout):
                await self._writer.drain()
                while "exit" not in (message := await self.message()):
                    said.append(message["output"])
        except TimeoutError as late:
            raise TimeoutError(f"{argv} took longer than {timeout:g} s and wrote:\n{''.join(said)}") from late
        return Finished(message["exit"], "".join(said))

    async def booted(self) -> None:
        """Wait until PID 1 says that it takes programs."""
        try:
            with anyio.fail_after(BOOT_TIMEOUT):
                self._ready = (await self.message())["ready"]
        except TimeoutError as late:
            raise TimeoutError(f"the nested machine didn't boot within {BOOT_TIMEOUT:g} s:\n{self.console()}") from late

    async def message(self) -> Any:
        """The next thing that PID 1 says."""
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise MachineEndedError(f"the nested machine ended:\n{self.console()}")
        return json.loads(line)


@asynccontextmanager
async def nested_machine(debian: Debian, bundle: Bundle) -> AsyncIterator[Machine]:
    """Boot the machine, with this repository, its Python libraries and the guest bundle in ``/work``."""
    if sys.version_info[:2] != PYTHON:
        raise RuntimeError(f"the nested machine has Python {PYTHON[0]}.{PYTHON[1]}: run the tests with that")
    folder = Path(tempfile.mkdtemp(prefix="nested-"))
    try:
        work = folder / "work.squashfs"
        await _pack(work, bundle)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            console = folder / "console"
            argv = _argv(debian, work, console, theirs.fileno())
            async with spawn(argv, pass_fds=[theirs.fileno()], kill=KILL):
                theirs.close()      # so that ours ends when QEMU does
                reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LINE)
                try:
                    machine = Machine(reader, writer, console)
                    await machine.booted()
                    yield machine
                finally:
                    writer.transport.abort()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _pack(into: Path, bundle: Bundle) -> None:
    site = Path(anyio.__file__).parent.parent
    staged = into.parent / "staged"
    staged.mkdir()
    for name in ("pykata", "adapters", "tests", "pyproject.toml"):
        (staged / name).symlink_to(ROOT / name)
    (staged / "site-packages").symlink_to(site)
    (staged / "bundle").symlink_to(bundle.path)
    tar = into.with_suffix(".tar")
    exclude = ["--exclude=*.pyc", "--exclude=mypyc", "--exclude=mypy"]
    await run_tool(["tar", "--dereference", *exclude, "--create", "--file", tar, "--directory", staged, "."])
    await squash(tar, into)
    tar.unlink()


def _argv(debian: Debian, work: Path, console: Path, control: int) -> list[str]:
    qemu = find_tool("qemu-system-x86_64", package="qemu-system-x86")
    # The guest's own calibration of its clock goes wrong at random while the host is busy.
    clock = f"tsc=reliable tsc_early_khz={_khz()}"
    return [
        str(qemu), "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none",
        "-machine", "q35,accel=tcg",
        "-cpu", "max",
        "-smp", str(CPUS),
        "-m", str(MEMORY),
        "-kernel", str(debian.kernel),
        "-initrd", str(debian.initrd),
        "-append", f"console=ttyS0 quiet panic=-1 {clock} mitigations=off",
        "-chardev", f"file,id=console,path={console}",
        "-serial", "chardev:console",
        *_disk("root", debian.root), *_disk("work", work),
        "-device", "virtio-serial-pci",
        "-chardev", f"socket,id=control,fd={control}",
        "-device", "virtserialport,chardev=control,name=nested",
    ]  # fmt: skip


def _disk(name: str, path: Path) -> list[str]:
    file = {"driver": "file", "filename": str(path), "read-only": True}
    disk = {"driver": "raw", "node-name": name, "read-only": True, "file": file}
    return ["-blockdev", json.dumps(disk), "-device", f"virtio-blk-pci,drive={name}"]


def _khz() -> int:
    # BogoMIPS is twice the frequency in MHz on x86 with a constant TSC.
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    mips = next(line.partition(":")[2] for line in lines if line.startswith("bogomips"))
    return int(float(mips) / 2 * 1000)


async def _look_around(commands: Sequence[str]) -> int:
    code = 0
    async with nested_machine(await debian(), find_bundle()) as machine:
        for command in commands:
            done = await machine.run("sh", "-c", command)
            print(f"$ {command}\n{done.output}[exit code {done.code}]", flush=True)
            code = code or done.code
    return code


if __name__ == "__main__":
    sys.exit(anyio.run(_look_around, sys.argv[1:]))
