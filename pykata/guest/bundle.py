"""Finds the guest bundle: the kernel and the RAM disk that every sandbox boots."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from attrs import field, frozen

from pykata.errors import BundleDamagedError, BundleError, BundleMissingError
from pykata.guest.cache import cache_root
from pykata.guest.inputs import FORMAT, host_arch, source_tree, tree_hash
from pykata.guest.trust import checked_before, remember
from pykata.host import file_hash

BUILD = "pykata guest build"
OUTPUTS = ("vmlinux", "initrd.cpio", "busybox.squashfs", "busybox.json")
WHEEL = "pykata_guest"
SETTLED = 1_000_000_000     # nanoseconds; file systems note times by a clock that ticks every few milliseconds


@frozen
class Bundle:
    """A guest bundle on disk. ``hash`` is that of everything it was made from."""

    path: Path
    architecture: str
    hash: str
    manifest: Mapping[str, Any] = field(repr=False, eq=False, hash=False)

    @property
    def kernel(self) -> Path:
        """The uncompressed kernel."""
        return self.path / "vmlinux"

    @property
    def initrd(self) -> Path:
        """The RAM disk, with the agent as its ``/init``."""
        return self.path / "initrd.cpio"

    @property
    def busybox(self) -> Path:
        """The filesystem of the builtin image ``busybox``."""
        return self.path / "busybox.squashfs"

    @property
    def busybox_config(self) -> Path:
        """The OCI config of the builtin image."""
        return self.path / "busybox.json"

    def verify(self) -> None:
        """Read every file and compare it with the manifest; raises BundleDamagedError. Takes about 0.1 s."""
        for name, said in self.manifest["outputs"].items():
            if file_hash(_sized(self.path, name, said)) != said["sha256"]:
                raise _damaged(self.path / name, "its content isn't what the manifest says")


def find_bundle(path: Path | None = None) -> Bundle:
    """The bundle to boot: ``path`` or ``$PYKATA_BUNDLE``, else the installed wheel's, else the cache's.

    Its files are read once, and again only when one of them has changed. In a source tree only a bundle that was built
    from these very sources will do. Raises BundleMissingError and BundleDamagedError.
    """
    if path is not None:
        return checked(load_bundle(path))
    if named := os.environ.get("PYKATA_BUNDLE"):
        return _of_environment(Path(named))
    carried = _carried()
    return checked(load_bundle(carried) if carried else cached_bundle(host_arch()))


def _of_environment(path: Path) -> Bundle:
    try:
        return checked(load_bundle(path))
    except BundleError as exc:
        exc.hint = f"correct or unset PYKATA_BUNDLE={path}"     # building one wouldn't help
        raise


def checked(bundle: Bundle) -> Bundle:
    """The bundle, every byte of which is what its manifest says. Raises BundleDamagedError."""
    files = [bundle.path / name for name in (*OUTPUTS, "manifest.json")]
    if not checked_before(bundle.path, files):
        bundle.verify()
        remember(bundle.path, files)
    return bundle


def load_bundle(path: Path) -> Bundle:
    """The bundle in the directory ``path``, its sizes checked."""
    manifest = _manifest(path)
    if manifest.get("format") != FORMAT:
        raise BundleMissingError(
            f"the guest bundle {path} has format {manifest.get('format')}, not {FORMAT}", hint=f"run: {BUILD}"
        )
    try:
        bundle = Bundle(path, manifest["arch"], manifest["hash"], manifest)
        for name in OUTPUTS:
            _sized(path, name, manifest["outputs"][name])
    except (KeyError, TypeError) as exc:
        raise _damaged(path / "manifest.json", f"it lacks {exc}") from exc
    if bundle.architecture != host_arch():
        raise BundleMissingError(
            f"the guest bundle {path} is for {bundle.architecture}, and this machine is {host_arch()}",
            hint=f"run: {BUILD}",
        )
    return bundle


def cached_bundle(arch: str) -> Bundle:
    """The bundle of the user's cache: of this source tree if there is one, else the newest."""
    root = source_tree()
    wanted = tree_hash(root, arch) if root else None
    folder = cache_root()
    path = _remembered(folder, _changed(folder), arch, wanted)
    if path is None or not _fits(path, wanted):
        path = _found(folder, arch, wanted)
    if path is None:
        raise _missing(arch, root)
    return load_bundle(path)


def _changed(folder: Path) -> int:
    """When a bundle came or went. A time is as good as its clock: what has just changed may have changed again."""
    try:
        changed = folder.stat().st_mtime_ns
    except FileNotFoundError:
        return time.time_ns()
    return changed if time.time_ns() - changed > SETTLED else time.time_ns()


def _found(folder: Path, arch: str, wanted: str | None) -> Path | None:
    return next((path for path in _newest_first(folder, arch) if _fits(path, wanted)), None)


# A cache of many bundles isn't looked through for each start.
_remembered = lru_cache(maxsize=8)(lambda folder, changed, arch, wanted: _found(folder, arch, wanted))


def _fits(path: Path, wanted: str | None) -> bool:
    manifest = _readable(path)
    return manifest.get("format") == FORMAT and wanted in (None, manifest.get("tree"))


def _missing(arch: str, root: Path | None) -> BundleMissingError:
    if root is None:
        return BundleMissingError(
            f"no guest bundle for {arch}, and pykata is installed without the sources to build one",
            hint="install the package pykata-guest, or set PYKATA_BUNDLE to a bundle built elsewhere",
        )
    return BundleMissingError(f"no guest bundle for {arch} of these sources in {cache_root()}", hint=f"run: {BUILD}")


def _newest_first(folder: Path, arch: str) -> list[Path]:
    found = folder.glob(f"{arch}-*/manifest.json")
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def _carried() -> Path | None:
    spec = importlib.util.find_spec(WHEEL)
    folders: Iterator[str] = iter(spec.submodule_search_locations or ()) if spec else iter(())
    return next((path for folder in folders if (path := Path(folder) / "bundle").is_dir()), None)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise BundleMissingError(f"no guest bundle in {path}: it has no manifest.json", hint=f"run: {BUILD}") from exc
    except OSError as exc:
        raise _damaged(path / "manifest.json", f"it can't be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise _damaged(path / "manifest.json", f"it isn't JSON: {exc}") from exc
    if not isinstance(manifest, dict):
        raise _damaged(path / "manifest.json", "it isn't a JSON object")
    return manifest


def _readable(path: Path) -> dict[str, Any]:
    # One damaged bundle in the cache doesn't hide the others.
    try:
        return _manifest(path)
    except (BundleDamagedError, BundleMissingError):
        return {}


def _sized(folder: Path, name: str, said: Mapping[str, Any]) -> Path:
    path = folder / name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except OSError as exc:
        raise _damaged(path, f"it can't be read: {exc.strerror}") from exc
    if size != said["size"]:
        raise _damaged(path, f"it has {size} bytes, not {said['size']}")
    return path


def _damaged(path: Path, why: str) -> BundleDamagedError:
    return BundleDamagedError(f"{path} of the guest bundle is damaged: {why}", hint=f"run: {BUILD} --force")
