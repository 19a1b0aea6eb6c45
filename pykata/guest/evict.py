"""Which bundles of the cache are in use, and the removal of those that nobody has used for long.

Every checkout on this machine has a bundle of its own in the same cache. A use is the directory's mtime and a shared
lock on it, for as long as a machine that was booted from it may still open its files.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pykata.errors import BundleError, BundleMissingError
from pykata.guest.bundle import BUILD, Bundle, find_bundle
from pykata.guest.cache import cache_root, part_path
from pykata.guest.inputs import mapping_hash
from pykata.host import is_at, try_lock

LONG = 30 * 24 * 3600.0     # seconds


@contextmanager
def in_use(bundle: Bundle) -> Iterator[None]:
    """Keep a bundle in the cache while the block runs. Raises BundleMissingError if it was just removed."""
    try:
        descriptor = os.open(bundle.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise _gone(bundle.path) from exc
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not is_at(descriptor, bundle.path):
            raise _gone(bundle.path)
        with suppress(OSError):         # an installed one may belong to another user
            os.utime(descriptor)
        yield
    finally:
        os.close(descriptor)


def _gone(path: Path) -> BundleMissingError:
    return BundleMissingError(f"the guest bundle {path} is gone", hint=f"run: {BUILD}")


def evict(unused: float = LONG) -> list[Path]:
    """Remove bundles that weren't used for so many seconds, and the parts that only they had; returns what went.

    The one that would be booted now stays, and so does what is in use. While somebody builds, nothing is removed.
    """
    root = cache_root()
    lock = try_lock(root / "lock")
    if lock is None:
        return []
    try:
        current = None
        with suppress(BundleError):
            current = find_bundle().path
        bundles = [manifest.parent for manifest in sorted(root.glob("*-*/manifest.json"))]
        removed = [path for path in bundles if path != current and _remove(path, root, unused)]
        needed = {part for path in bundles if path not in removed for part in _parts(root, path)}
        parts = [path for path in sorted((root / "parts").glob("*")) if path not in needed]
        return removed + [path for path in parts if _remove(path, root, unused)]
    finally:
        os.close(lock)


def _remove(path: Path, root: Path, unused: float) -> bool:
    with suppress(FileNotFoundError, NotADirectoryError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_mtime > time.time() - unused:
                return False
            # Out of the way at once: who looks for it meanwhile finds all of it or nothing.
            gone = Path(tempfile.mkdtemp(prefix="tmp-old-", dir=root))
            path.rename(gone / "old")
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        shutil.rmtree(gone, ignore_errors=True)
        return True
    return False


def _parts(root: Path, bundle: Path) -> list[Path]:
    """What a bundle was put together from; what it doesn't say is nothing."""
    try:
        inputs = json.loads((bundle / "manifest.json").read_bytes())["inputs"]
        return [part_path(root, name, mapping_hash(each)) for name, each in inputs.items()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
