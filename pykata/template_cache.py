"""Templates that make themselves: for each kind of sandbox a booted guest is saved once, and the next start from it.

One is a directory in the user's cache, named by the hash of all that decides what is in it: the guest bundle, QEMU's
build, the machine and its options. It appears whole or not at all; who finds it damaged removes it. Only one process
makes one at a time, and nobody waits for that: who comes meanwhile boots. A killed maker leaves a directory that the
next one removes. The least recently used go when all together exceed :data:`MOST`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio
from anyio.lowlevel import RunVar
from attrs import define, field

from pykata import saved, saved_disks
from pykata.boot import TemplateWarning
from pykata.errors import HostError, SavedDamagedError
from pykata.host import cache_dir, finish, is_at, open_lock, size_in
from pykata.loading import loading
from pykata.origin import Origin

log = logging.getLogger(__name__)

MOST = 2 * 1024**3
"""Bytes that all templates of a user together may take; ``$PYKATA_TEMPLATES_SIZE`` overrides it."""
VARIABLE = "PYKATA_TEMPLATES_SIZE"


def limit() -> int:
    """Bytes that all templates together may take. Raises ConfigError."""
    return size_in(VARIABLE, MOST)


def unusable(why: Exception) -> str:
    """Say that there can be no templates; returns why."""
    reason = f"templates can't be kept: {why}"
    warnings.warn(reason, TemplateWarning, stacklevel=2)
    return reason


def folder_of(identity: Mapping[str, str]) -> Path:
    """Where the template of such machines is, or would be. Raises OSError where none can be."""
    text = json.dumps({**identity, "format": saved.FORMAT}, sort_keys=True)
    try:
        root = cache_dir() / "templates"
    except HostError as error:
        raise OSError(str(error)) from error
    root.mkdir(mode=0o700, exist_ok=True)
    return root / hashlib.sha256(text.encode()).hexdigest()[:32]


# --- using one ---


@define(eq=False)
class _Loaded:
    """A template in memory, for all sandboxes of this event loop that go on from it."""

    lock: anyio.Lock = field(factory=anyio.Lock)
    stack: AsyncExitStack = field(factory=AsyncExitStack)
    origin: Origin | None = None
    place: int = -1         # the directory that it is from, open
    users: int = 0


_all: RunVar[dict[Path, _Loaded]] = RunVar("pykata_templates")


@asynccontextmanager
async def loaded(folder: Path) -> AsyncIterator[Origin | None]:
    """The template, in memory as long as someone uses it; None if there is none that is of use.

    Its memory may still be on its way: who finds that it isn't what was saved says so to :func:`drop`.
    """
    try:
        everyone = _all.get()
    except LookupError:
        everyone = {}
        _all.set(everyone)
    one = everyone.setdefault(folder, _Loaded())
    one.users += 1
    try:
        async with one.lock:
            if one.origin is None or is_stale(one.origin):
                one.origin = await _load(folder, one)
        yield one.origin
    finally:
        one.users -= 1
        if not one.users:
            del everyone[folder]
            await finish(one.stack.aclose())


async def _load(folder: Path, one: _Loaded) -> Origin | None:
    try:
        # Open as long as it is used: no other directory has its inode number then.
        one.place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise HostError(f"can't use the template {folder}: {exc.strerror}") from exc
    one.stack.callback(os.close, one.place)
    try:
        origin = await one.stack.enter_async_context(loading(folder, "template"))
    except FileNotFoundError:
        return None
    except SavedDamagedError as damaged:
        _discard(folder, one.place, damaged)
        return None
    with suppress(OSError):
        os.utime(folder / saved.STATE)      # who was used last stays longest
    return origin


def is_stale(origin: Origin) -> bool:
    """Whether a disk of a template in memory isn't there any more, or is another one."""
    return not saved_disks.are_unchanged(origin.vm.slots.values())


def drop(folder: Path, origin: Origin, why: Exception) -> None:
    """Remove a template in use that is of no use, and say so: once, however many have found out."""
    one = _all.get({}).get(folder)
    if one is not None and one.origin is origin:
        one.origin = None
        _discard(folder, one.place, why)


def _discard(folder: Path, place: int, why: Exception) -> None:
    if not is_at(place, folder):
        return      # somebody else has removed it, and may have put a better one there
    warnings.warn(f"a template was removed: {why}", TemplateWarning, stacklevel=2)
    with suppress(OSError):
        folder.unlink()         # something else in its place
    shutil.rmtree(folder, ignore_errors=True)


# --- making one ---


@contextmanager
def turn_to_make(folder: Path) -> Iterator[bool]:
    """Whether it is ours to make this template; if so nobody else does while the block runs. Raises HostError."""
    with _lock(folder.name) as ours:
        yield ours and not folder.exists()


def keep(folder: Path, origin: Origin) -> None:
    """Put a template into the cache. Call it in one's turn, in a worker thread. Raises HostError."""
    fresh = folder.with_name(f"tmp-{folder.name}")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        saved.write(fresh, origin)
        fresh.rename(folder)
        _collect(folder)
    except OSError as exc:
        raise HostError(f"can't keep the template {folder}: {exc.strerror}") from exc
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _collect(newest: Path) -> None:
    """Remove what killed makers left, and what was used least recently beyond the limit."""
    for leftover in newest.parent.glob("tmp-*"):
        with _lock(leftover.name.removeprefix("tmp-")) as ours:
            if ours:
                shutil.rmtree(leftover, ignore_errors=True)
    room = limit()
    states = [state for state in newest.parent.glob(f"*/{saved.STATE}") if not state.parent.name.startswith("tmp-")]
    for state in sorted(states, key=_last_use, reverse=True):
        room -= _size(state.parent)
        if room < 0 and state.parent != newest:
            log.info("template %s makes room", state.parent.name)
            shutil.rmtree(state.parent, ignore_errors=True)


def _size(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:       # somebody else removes it
        return 0


def _last_use(state: Path) -> float:
    try:
        return state.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextmanager
def _lock(name: str) -> Iterator[bool]:
    """The lock of one template, if nobody has it. It goes with its holder, however that ends."""
    path = cache_dir() / "templates" / f"{name}.lock"
    try:
        descriptor = open_lock(path)
    except OSError as exc:
        raise HostError(f"can't use {path}: {exc.strerror}") from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
