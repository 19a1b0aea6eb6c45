"""The directories of this user: the cache, and a run directory for each sandbox."""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import logging
import os
import shutil
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from pykata.errors import DiskFullError, HostError, NotPermittedError
from pykata.host.cleanup import finish

log = logging.getLogger(__name__)

OWNER = "owner"


def cache_dir() -> Path:
    """The user's cache: ``$PYKATA_CACHE``, else ``$XDG_CACHE_HOME/pykata``, else ``~/.cache/pykata``."""
    if named := os.environ.get("PYKATA_CACHE"):
        path = Path(named)
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or _home("PYKATA_CACHE") / ".cache") / "pykata"
    with _explained(path, "PYKATA_CACHE"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path.absolute()


def run_root() -> Path:
    """The directory that holds the run directories of this user."""
    if named := os.environ.get("PYKATA_RUN"):
        path = Path(named)
    elif named := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(named, "pykata")
    elif os.geteuid() == 0:
        path = Path("/run/pykata")
    else:
        import tempfile  # costs 5 ms, and few come here

        path = Path(tempfile.gettempdir(), f"pykata-{os.geteuid()}")
    return _of_our_own(path, "PYKATA_RUN")


def state_dir() -> Path:
    """What must outlive the user's session: ``$PYKATA_STATE``, else ``$XDG_STATE_HOME/pykata``, else
    ``~/.local/state/pykata``. Not below the run directory, which goes when the user logs out."""
    if named := os.environ.get("PYKATA_STATE"):
        path = Path(named)
    else:
        path = Path(os.environ.get("XDG_STATE_HOME") or _home("PYKATA_STATE") / ".local" / "state") / "pykata"
    return _of_our_own(path, "PYKATA_STATE")


def _home(variable: str) -> Path:
    """The user's home directory. One that isn't there stays so: a user of a service has none on purpose."""
    hint = f"set {variable} to a directory of your own"
    try:
        home = Path.home()
    except RuntimeError as exc:
        raise HostError("this user has no home directory", hint=hint) from exc
    with _explained(home, variable):
        there = home.is_dir()
    if not there:
        raise HostError(f"the home directory {home} isn't there", hint=hint)
    return home


def _of_our_own(path: Path, variable: str) -> Path:
    """The directory, made if it is missing. Raises NotPermittedError if another user can write to it."""
    with _explained(path, variable):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    # In /tmp anyone may have been there first: with a symlink, or with a directory of their own.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise NotPermittedError(f"{path} is not a directory that only uid {os.geteuid()} can write",
                                hint=f"set {variable} to a directory of your own")
    return path.absolute()


@asynccontextmanager
async def run_dir() -> AsyncIterator[Path]:
    """A fresh directory that only we can enter; removed on exit, whatever happened in it.

    Its file ``owner`` names the process that made it, for :func:`abandoned_run_dirs`.
    """
    root, name = run_root(), os.urandom(5).hex()
    fresh, path = root / f".{name}", root / name
    try:
        with _explained(root, "PYKATA_RUN"):
            fresh.mkdir(mode=0o700)
            (fresh / OWNER).write_text(_ourselves(os.getpid()))
            fresh.rename(path)      # by now it has an owner: a gc never sees it without one
        yield path
    finally:
        # The second is there if it couldn't be made whole: no descriptors are left, say, which to look into it takes.
        if not _remove_empty(path) and not _remove_empty(fresh):
            await finish(asyncio.to_thread(_remove, fresh, path))


@contextmanager
def _explained(path: Path, variable: str) -> Iterator[None]:
    """Turn the system's complaint about ``path`` into an error that names the way to another one."""
    try:
        yield
    except OSError as exc:
        kind = {
            errno.EACCES: NotPermittedError, errno.EPERM: NotPermittedError, errno.EROFS: NotPermittedError,
            errno.ENOSPC: DiskFullError, errno.EDQUOT: DiskFullError,
        }.get(exc.errno or 0, HostError)  # fmt: skip
        raise kind(f"can't use {path}: {exc.strerror}", hint=f"set {variable} to a directory of your own") from exc


def abandoned_run_dirs() -> list[Path]:
    """Run directories whose process has ended without removing them: it was killed."""
    return [path for path in sorted(run_root().iterdir()) if path.is_dir() and _has_owner(path) and not _owned(path)]


def owner_of(path: Path) -> int | None:
    """The process that has a run directory; None if it has ended, or never had one."""
    return int(json.loads((path / OWNER).read_text())["pid"]) if _has_owner(path) and _owned(path) else None


def _has_owner(path: Path) -> bool:
    # One that is being made is hidden, and for a moment without an owner.
    return not path.name.startswith(".") or (path / OWNER).exists()


def _owned(path: Path) -> bool:
    try:
        owner = json.loads((path / OWNER).read_text())
        return bool(owner == _identify(int(owner["pid"])))
    except FileNotFoundError:
        return not (path / OWNER).parent.is_dir()     # being removed by its owner right now
    except (ValueError, TypeError, KeyError, ProcessLookupError):
        return False


@contextmanager
def short_name(directory: Path) -> Iterator[str]:
    """A name of the directory that fits into a socket's path, of at most 107 bytes (unix(7))."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@functools.cache
def _ourselves(pid: int) -> str:
    return json.dumps(_identify(pid))


# Who is another process, one day perhaps by the same pid.
os.register_at_fork(after_in_child=_ourselves.cache_clear)


def _identify(pid: int) -> dict[str, str | int]:
    """What tells this process from a later one with the same pid. Raises ProcessLookupError."""
    try:
        # proc_pid_stat(5): the name (2) may hold blanks and parentheses; state is field 3, starttime field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"pid": pid, "start": int(fields[19]), "boot": boot}


def _remove_empty(path: Path) -> bool:
    """Remove a directory in which there is nothing but its owner, which takes less than to have a thread do it."""
    try:
        with suppress(FileNotFoundError):
            os.unlink(path / OWNER)
        os.rmdir(path)
    except OSError:
        return False
    return True


def _remove(*paths: Path) -> None:
    for path in paths:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            pass
        except OSError as exc:
            log.warning("can't remove %s: %s", path, exc)
