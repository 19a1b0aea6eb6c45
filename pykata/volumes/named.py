"""Volumes that have a name, and outlive sandboxes."""

from __future__ import annotations

import os
from pathlib import Path

from attrs import field, frozen, validators

from pykata.errors import ConfigError, HostError, VolumeInUseError
from pykata.host import remove_tree, state_dir
from pykata.spec import Security
from pykata.volumes import checks
from pykata.volumes.kinds import CACHES, VIAS, Bind, Cache, DiskImage, Via
from pykata.volumes.marks import is_marked

DISKS = ".disks"        # beside the named volumes: those that have a size


@frozen
class Named:
    """A directory that pykata keeps for this user under a name, and that outlives sandboxes.

    ::

        Sandbox(volumes={"/root/.cache": Named("cache"), "/data": Named("results", size="1G", files=10_000)})

    It is made when a :class:`Sandbox` is first made with it, below ``$PYKATA_STATE``; several sandboxes may use it at
    the same time. ``readonly``, ``cache``, ``via`` and ``security`` are as for :class:`Bind`. See :func:`list_volumes`
    and :func:`remove_volume`.

    With a ``size`` (MiB or text) it is a disk of its own, as :class:`DiskImage`: a guest can't write more than that,
    nor make more than ``files`` files and directories, about, and only one sandbox writes to it at a time. The size is
    that with which it was made.
    """

    name: str = field(validator=checks.name)
    readonly: bool = field(default=False, validator=checks.flag)
    cache: Cache = field(default="auto", validator=checks.one_of(*CACHES))
    via: Via = field(default="auto", validator=checks.one_of(*VIAS))
    size: int | str | None = None
    files: int | None = field(default=None, validator=validators.optional(checks.count))
    security: Security = field(default="none", kw_only=True, validator=checks.security)

    def __attrs_post_init__(self) -> None:
        checks.disk_size(self.size)
        if self.files is not None and self.size is None:
            raise ConfigError(f"files={self.files} without a size", hint="only a volume with a size= is limited")

    def found(self) -> Bind | DiskImage:
        """It as what it is. Raises ConfigError."""
        directory, disk = _folder() / self.name, _folder() / DISKS / self.name
        if self.size is None and not disk.exists():
            return Bind(directory, self.readonly, self.cache, self.via, security=self.security)
        if directory.exists():
            raise ConfigError(f"the volume {self.name!r} has no size: it was made without",
                              hint="remove it, or take another name")
        if self.security != "none":
            raise ConfigError(f"security={self.security!r}: the volume {self.name!r} has a size, and is a disk",
                              hint="leave it out: a disk keeps owners, modes and kinds as they are")
        make_directory(disk.parent, mode=0o700)
        return DiskImage(disk, self.size, self.files, self.readonly)


def list_volumes() -> list[str]:
    """The names of the volumes that this user has."""
    return [path.name for path in named_paths()]


def named_paths() -> list[Path]:
    """Where the named volumes are, by name: directories and disks."""
    found = [path for folder in _folders() for path in folder.glob("*") if not path.name.startswith(".")]
    return sorted(found, key=lambda path: path.name)


def is_named(path: Path) -> bool:
    """Whether it is one of the named volumes. For any other path nothing is made or asked: there may be no home."""
    return path.parent.name in ("volumes", DISKS) and path.parent in _folders()


def remove_volume(name: str, *, force: bool = True) -> None:
    """Remove a named volume and all that is in it. Raises ConfigError if there is none.

    A sandbox that uses it isn't asked: a directory is empty then, while a disk is there for as long as somebody has it.
    HostError tells what is left of a directory in which a sandbox goes on making files meanwhile.
    With ``force=False`` a volume that a sandbox of this machine uses is a VolumeInUseError, and stays.
    """
    volume = Named(name).found()
    if not force and is_marked(volume.path):
        raise VolumeInUseError(f"a sandbox uses the volume {name!r}", hint="end it first, or remove by force")
    path = volume.path
    # Out of the way first: who comes now gets a new one.
    gone = path.with_name(f".{name}-{os.urandom(4).hex()}")
    try:
        if isinstance(volume, DiskImage):
            return path.unlink()        # who uses it goes on with what is nobody else's then
        path.rename(gone)
    except FileNotFoundError:
        known = ", ".join(list_volumes()) or "none"
        raise ConfigError(f"there is no volume {name!r}", hint=f"there are {known}") from None
    except OSError as exc:
        raise HostError(f"volume {name!r} can't be removed: {exc.strerror}", hint=f"it is {path}") from exc
    try:
        remove_tree(gone)
    except OSError as exc:
        raise HostError(f"volume {name!r} can't be removed whole: {exc}", hint=f"remove {gone}") from exc


def make_directory(path: Path, mode: int = 0o755) -> None:
    """Make a directory unless it is there. Raises HostError."""
    try:
        path.mkdir(mode=mode, exist_ok=True)
    except OSError as exc:
        raise HostError(f"can't make the volume {path}: {exc.strerror}",
                        hint="set PYKATA_STATE to a directory of your own") from exc


def _folders() -> tuple[Path, Path]:
    return _folder(), _folder() / DISKS


def _folder() -> Path:
    path = state_dir() / "volumes"
    make_directory(path, mode=0o700)
    return path
