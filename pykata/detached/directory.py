"""The directory of a detached sandbox: its name is taken by making it, and it is alive while a lock in it is held.

::

    STATE/sandboxes/.lock           held while a directory appears or disappears
    STATE/sandboxes/NAME/lock       locked by the keeper for as long as it lives
    STATE/sandboxes/NAME/state.json what is known of it, replaced as a whole
    STATE/sandboxes/NAME/socket     where the keeper listens
    STATE/sandboxes/NAME/log        what the main command writes; log.1 is the part before
    STATE/sandboxes/NAME/keeper.log what the keeper itself has to complain about
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from attrs import asdict, fields, frozen

from pykata import host
from pykata.errors import (
    ConfigError,
    DetachedError,
    DetachedNotFoundError,
    DetachedTakenError,
    HostError,
)
from pykata.spec import Phase, Reason

VERSION = 1
MAX_NAME = 63
BACKLOG = 128           # clients that may connect while the keeper is busy, or boots

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@frozen(kw_only=True)
class State:
    """What is known of a detached sandbox. Times are seconds since 1970; None is what didn't happen or isn't known."""

    name: str
    phase: Phase
    image: str | None = None
    args: tuple[str, ...] = ()
    created: float = 0.0
    ended: float | None = None
    keeper: int | None = None
    vmm: int | None = None
    exit_code: int | None = None
    reason: Reason | None = None
    why: str = ""
    lost: str = ""


def check_name(name: object) -> str:
    """A sandbox's name. Raises ConfigError."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise ConfigError(
            f"name={name!r} is not a name for a sandbox",
            hint=f"letters, digits, '_', '.' and '-', beginning with a letter or digit, at most {MAX_NAME} characters",
        )
    return name


@frozen
class Directory:
    """The directory of one detached sandbox."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def log(self) -> Path:
        """What the main command wrote."""
        return self.path / "log"

    @property
    def complaints(self) -> Path:
        """What the keeper complained of."""
        return self.path / "keeper.log"

    def read(self) -> State:
        """What is known of the sandbox; the phase is ``"lost"`` if its keeper died without a word.

        Raises DetachedNotFoundError, and DetachedError for what another version wrote.
        """
        try:
            alive = self._is_alive()        # first: who ends meanwhile has written how, before it let go of the lock
            raw = json.loads((self.path / "state.json").read_bytes())
        except FileNotFoundError:
            raise unknown(self.name) from None
        except OSError as exc:
            raise HostError(f"can't read the state of sandbox {self.name!r}: {exc}") from exc
        except ValueError:
            raw = None
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            said = raw.get("version") if isinstance(raw, dict) else "none"
            raise DetachedError(
                f"the state of sandbox {self.name!r} has version {said}, and this pykata knows {VERSION}",
                name=self.name, hint=f"use the pykata that started it, or remove it: pykata rm {self.name}",
            )
        known = {field.name for field in fields(State)}
        state = State(**{name: value for name, value in raw.items() if name in known} | {"args": tuple(raw["args"])})
        return state if alive or state.phase == "ended" else _lost(state)

    def write(self, state: State) -> None:
        """Replace what is known: readers see the old state or the new one."""
        new = self.path / "state.json.new"
        new.write_text(json.dumps({"version": VERSION, **asdict(state)}))
        new.rename(self.path / "state.json")

    def _is_alive(self) -> bool:
        with _opened(self.path / "lock") as lock:
            return host.byte_is_locked(lock)

    @contextmanager
    def reachable(self) -> Iterator[str]:
        """The path of its socket, short enough for any directory (unix(7) allows 107 bytes)."""
        with _opened(self.path, os.O_PATH | os.O_DIRECTORY) as descriptor:
            yield f"/proc/self/fd/{descriptor}/socket"


@frozen
class Claim:
    """A name that is ours. Whoever has the two descriptors is the keeper; they are inherited."""

    directory: Directory
    lock: int
    """The lock file, locked."""
    listener: socket.socket
    """Listens from the beginning: who connects while the sandbox boots waits in its queue."""


@contextmanager
def claimed(name: str, state: State) -> Iterator[Claim]:
    """Take a name; yields what its keeper needs. Blocks for moments. Raises DetachedTakenError."""
    with ExitStack() as stack:
        yield _claim(stack, name, state)


def _claim(stack: ExitStack, name: str, state: State) -> Claim:
    root = _root()
    with _changing(root):
        directory, fresh = Directory(root / name), root / f".{name}"
        if directory.path.exists():
            raise _taken(directory)
        shutil.rmtree(fresh, ignore_errors=True)        # of someone who was killed right here
        fresh.mkdir(mode=0o700)
        try:
            lock = stack.enter_context(_opened(fresh / "lock", os.O_RDWR | os.O_CREAT))
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
            host.lock_byte(lock)
            with Directory(fresh).reachable() as path:
                listener.bind(path)
            listener.listen(BACKLOG)
            Directory(fresh).write(state)
            fresh.rename(directory.path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    return Claim(directory, lock, listener)


def find(name: str) -> Directory:
    """The directory of the sandbox of this name. Raises DetachedNotFoundError."""
    directory = Directory(_root() / check_name(name))
    if not directory.path.is_dir():
        raise unknown(name)
    return directory


def every() -> list[Directory]:
    """All detached sandboxes, alive or not, by name."""
    # What else lies there, a file of an editor or a file manager, is none, and hides none.
    return [Directory(path) for path in sorted(_root().iterdir()) if _NAME.fullmatch(path.name) and path.is_dir()]


def remove(directory: Directory, *, alive: bool = False) -> None:
    """Remove a sandbox's directory; the name is free then. Blocks for moments.

    Raises DetachedError if it runs, unless the caller holds its lock and says so by ``alive``.
    """
    with _changing(_root()) as root:
        gone = root / f".{directory.name}"
        try:
            if not alive and directory._is_alive():
                raise DetachedError(
                    f"sandbox {directory.name!r} is running", name=directory.name, hint=f"pykata stop {directory.name}"
                )
            shutil.rmtree(gone, ignore_errors=True)
            directory.path.rename(gone)     # so that nobody sees half of it, should we be killed
        except FileNotFoundError:
            if not directory.path.exists():
                raise unknown(directory.name) from None
        shutil.rmtree(gone if gone.exists() else directory.path)


def leftovers() -> list[Path]:
    """Remove what someone left who was killed while a directory appeared or disappeared; returns what it was."""
    with _changing(_root()) as root:
        found = [path for path in sorted(root.iterdir()) if path.name.startswith(".") and path.is_dir()]
        for path in found:
            shutil.rmtree(path)
    return found


def unknown(name: str) -> DetachedNotFoundError:
    """The error for a name that no sandbox has."""
    return DetachedNotFoundError(f"there is no sandbox {name!r}", name=name, hint="pykata ps --all lists them")


def _taken(directory: Directory) -> DetachedTakenError:
    phase = directory.read().phase
    hint = {"ended": f"pykata rm {directory.name}", "lost": "pykata gc"}.get(phase, "choose another name")
    how = {"ended": "it has ended", "lost": "its keeper was killed"}.get(phase, "it is running")
    return DetachedTakenError(f"there is a sandbox {directory.name!r} already: {how}", name=directory.name, hint=hint)


def _lost(state: State) -> State:
    from attrs import evolve

    return evolve(state, phase="lost", why="its keeper was killed, and the virtual machine with it")


def _root() -> Path:
    root = host.state_dir() / "sandboxes"
    root.mkdir(mode=0o700, exist_ok=True)
    return root


@contextmanager
def _changing(root: Path) -> Iterator[Path]:
    """One process at a time makes or removes directories. It takes moments, so nobody minds to wait for it."""
    import fcntl

    with _opened(root / ".lock", os.O_RDWR | os.O_CREAT) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield root
        except OSError as exc:
            raise HostError(f"can't change {root}: {exc}", hint="PYKATA_STATE names another place") from exc


@contextmanager
def _opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            os.close(descriptor)
