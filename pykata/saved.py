"""Saved guests as directories: complete, checked as they are read, and good on another machine of the same kind.

``memory`` has the pages that aren't zero, one after the other; ``devices`` is the VMM's own; ``slotN`` are the disks
that are plugged in (see :mod:`.saved_disks`); ``state.json`` has the rest, and the hashes of the others.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from attrs import asdict

from pykata import saved_disks
from pykata.errors import HostError, SavedDamagedError, SavedMissingError
from pykata.host import Stamp, copy_range, extents, held, memory_file, seal, stamp
from pykata.origin import Origin, SavedContainer
from pykata.saved_state import checked
from pykata.spec import ImageConfig, SavedVM, Start

FORMAT = 2
STATE = "state.json"
PIECE = 64 * 1024           # bytes of memory that are written or not; each part costs a call to read
_DAMAGE = {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EIO}
_verified: set[Stamp] = set()
"""The memory files whose hash this process has compared, by what tells one from another."""


def write(folder: Path, origin: Origin) -> None:
    """Write a saved guest into a directory, which is made. It takes some 50 ms, and
    longer with large disks, so call it in a worker thread. Raises OSError."""
    folder.mkdir(mode=0o700)
    runs, digest = _write_memory(folder / "memory", origin.vm.memory)
    _private(folder / "devices", origin.vm.devices)
    disks = saved_disks.write(folder, origin.vm.slots)
    state = {
        "format": FORMAT,
        "identity": dict(origin.identity),
        "size": os.fstat(origin.vm.memory).st_size,
        "runs": runs,
        "memory": digest,
        "devices": hashlib.sha256(origin.vm.devices).hexdigest(),
        "disks": [asdict(disk) for disk in disks],
        "greeting": origin.greeting.hex(),
        "parked": origin.parked,
        "memory_limit": origin.memory_limit,
        "main": origin.main,
        "idle": origin.idle,
        "containers": [asdict(container) for container in origin.containers],
        "next_number": origin.next_number,
    }
    text = json.dumps(state)
    # The hash of the rest itself, before it: nothing is believed that a torn write could have left.
    _private(folder / STATE, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())


def identity(folder: Path) -> Mapping[str, str]:
    """What a machine has to be to go on from there. Raises SavedDamagedError, SavedMissingError."""
    with _explained(folder):
        return dict(_state(folder)["identity"])


@contextmanager
def opened(folder: Path, start: Start) -> Iterator[Origin]:
    """A saved guest from a directory, in memory while the block runs. Blocks for some 50 ms.

    Raises SavedDamagedError for one that isn't whole, SavedMissingError if there is none.
    """
    with begun(folder, start) as (origin, fill):
        fill()
        yield origin


@contextmanager
def begun(folder: Path, start: Start) -> Iterator[tuple[Origin, Callable[[], None]]]:
    """The same, without what is in its memory: that is read by the function that comes with it, and raises as this."""
    with ExitStack() as stack:
        with _explained(folder):
            state = _state(folder)
            devices = _content(folder / "devices")
            if hashlib.sha256(devices).hexdigest() != state["devices"]:
                raise ValueError("the devices aren't those that were saved")
            source = _file(folder / "memory")       # all of it is there, also if it is removed meanwhile
            stack.callback(os.close, source)
            memory = stack.enter_context(memory_file(state["size"]))
        file = stack.enter_context(held(memory))
        with _explained(folder):
            origin = Origin(
                vm=SavedVM(file, devices, saved_disks.read(folder, state["disks"])),
                greeting=bytes.fromhex(state["greeting"]), parked=state["parked"],
                memory_limit=state["memory_limit"], start=start,
                containers=tuple(_container(each) for each in state["containers"]),
                main=state["main"], idle=state.get("idle", False), next_number=state["next_number"],
                identity=state["identity"],
            )  # fmt: skip

        def fill() -> None:
            with _explained(folder):
                _read_memory(source, state["runs"], state["memory"], memory)
                seal(memory)

        yield origin, fill


def _container(saved: dict[str, Any]) -> SavedContainer:
    config = {**saved["config"], "entrypoint": tuple(saved["config"]["entrypoint"])}
    return SavedContainer(**{**saved, "config": ImageConfig(**{**config, "cmd": tuple(config["cmd"])})})


def _state(folder: Path) -> dict[str, Any]:
    digest, _, text = _content(folder / STATE).decode().partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"{STATE} isn't what was written")
    state = json.loads(text)
    if state["format"] != FORMAT:
        raise ValueError(f"it has format {state['format']}, not {FORMAT}")
    return checked(state)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as exc:
        if not folder.exists():
            raise SavedMissingError(f"there is no saved guest {folder}") from exc
        raise SavedDamagedError(f"the saved guest {folder} is incomplete: {exc.filename} is missing") from exc
    except OSError as exc:          # no descriptors are left, say
        kind = SavedDamagedError if exc.errno in _DAMAGE else HostError
        raise kind(f"can't read the saved guest {folder}: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise SavedDamagedError(f"the saved guest {folder} is damaged: {exc}") from exc


def _write_memory(path: Path, memory: int) -> tuple[list[tuple[int, int]], str]:
    """Write what isn't zero; returns where that was, and its hash."""
    digest = hashlib.sha256()
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with mmap.mmap(memory, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            runs = list(_filled(mapped, extents(memory)))
            for start, end in runs:
                digest.update(view[start:end])
                copy_range(memory, target, start, end)
    finally:
        os.close(target)
    return runs, digest.hexdigest()


def _filled(memory: mmap.mmap, runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of these that aren't zero, by pieces of :data:`PIECE`.

    A guest has many pages of zeros that its machine has memory for: a fourth, as that comes in huge pages.
    """
    nothing = bytes(PIECE)
    for start, end in runs:
        first = start           # of the part that hasn't ended yet
        for at in range(start, end, PIECE):
            if memory[at : (after := min(at + PIECE, end))] == nothing[: after - at]:
                if first < at:
                    yield first, at
                first = after
        if first < end:
            yield first, end


def _read_memory(source: int, runs: list[tuple[int, int]], digest: str, memory: int) -> None:
    found = os.fstat(source)
    if found.st_size != sum(end - start for start, end in runs):
        raise ValueError(f"memory has {found.st_size} bytes, which isn't what was saved")
    at = 0
    for start, end in runs:
        os.lseek(memory, start, os.SEEK_SET)
        copy_range(source, memory, at, at + end - start)
        at += end - start
    mark = stamp(found)
    if mark not in _verified:
        if _hash(memory, runs) != digest:
            raise ValueError("memory isn't what was saved")
        _verified.add(mark)


def _hash(memory: int, runs: list[tuple[int, int]]) -> str:
    digest = hashlib.sha256()
    with mmap.mmap(memory, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped, memoryview(mapped) as view:
        for start, end in runs:
            digest.update(view[start:end])
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    with open(_file(path), "rb") as file:
        return file.read()


def _file(path: Path) -> int:
    """A descriptor of it. What isn't a file could be waited for without an end. Raises ValueError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise ValueError(f"{path.name} isn't a file")


def _private(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
