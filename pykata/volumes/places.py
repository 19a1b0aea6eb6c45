"""Volumes by their places in a container, checked against what this machine has."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from attrs import evolve

from pykata.errors import ConfigError, ToolMissingError
from pykata.fs.virtiofs import daemon
from pykata.spec import PMEM_UNIT
from pykata.volumes.checks import is_filesystem
from pykata.volumes.kinds import Bind, DiskImage, FsspecVolume, ImageVolume, Tmpfs
from pykata.volumes.named import Named, make_directory

NOT_OVER = ("/", "/proc", "/sys", "/dev")
"""What belongs to the guest's kernel, or to the image as a whole."""

MOST = 64               # volumes of a sandbox

Volume = Bind | DiskImage | FsspecVolume | ImageVolume | Named | Tmpfs
Checked = Bind | DiskImage | FsspecVolume | ImageVolume | Tmpfs


def check_volumes(volumes: Mapping[str, Volume | str | Path] | None) -> dict[str, Checked]:
    """Volumes by their places in a container. Raises :class:`ConfigError`."""
    if volumes is not None and not isinstance(volumes, Mapping):
        raise ConfigError(f"volumes={volumes!r} is not a mapping", hint='give {"/place/in/container": "./directory"}')
    checked = {_destination(place): _volume(place, volume) for place, volume in (volumes or {}).items()}
    if len(checked) != len(volumes or {}):
        raise ConfigError(f"volumes has a place twice: {sorted(volumes or {})}")
    if len(checked) > MOST:
        raise ConfigError(f"volumes has {len(checked)} volumes", hint=f"at most {MOST}")
    for place in checked:
        _check_above(place, checked)
    # One below another comes after it, or it would be hidden.
    return dict(sorted(checked.items()))


def _check_above(place: str, checked: Mapping[str, Checked]) -> None:
    """That a place in another volume is there, if it can't be made."""
    above = max((other for other in checked if place.startswith(f"{other}/")), key=len, default=None)
    volume = checked[above] if above is not None else None
    if not isinstance(volume, Bind) or not volume.readonly:
        return
    below = volume.path / place.removeprefix(f"{above}/")
    steps = [below, *below.parents][: len(below.parts) - len(volume.path.parts)]
    if any(map(os.path.islink, steps)):
        return          # it leads through the container, not through this machine: the agent will see
    if _kind_of(place, below) is None:
        raise ConfigError(f"volumes[{place!r}]: {above!r} is read-only, and there is no {str(below)!r} to put it over",
                          hint="make it first, or leave out readonly")


def _destination(place: object) -> str:
    hint = 'give an absolute path in the container, such as "/data"'
    if not isinstance(place, str) or not place.startswith("/") or "\0" in place:
        raise ConfigError(f"volumes has a place {place!r} that is no absolute path", hint=hint)
    if ".." in place.split("/"):
        raise ConfigError(f"volumes has a place {place!r} with '..' in it", hint=hint)
    normal = "/" + "/".join(part for part in place.split("/") if part not in ("", "."))
    try:
        raw = normal.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"volumes has a place {place!r} that is not text in UTF-8", hint=hint) from None
    if len(raw) > 1024:
        raise ConfigError(f"volumes has a place of {len(normal)} characters", hint="at most 1024 bytes")
    if max(map(len, raw.split(b"/"))) > 255:
        raise ConfigError(f"volumes has a place {place!r} with a name of more than 255 bytes",
                          hint="no directory can have one")
    if normal == "/" or normal.startswith(tuple(f"{top}/" for top in NOT_OVER[1:])) or normal in NOT_OVER:
        raise ConfigError(f"volumes has a place {place!r}, over what belongs to the guest's kernel or is the image",
                          hint="choose a path that is not /, and not in /proc, /sys or /dev")
    return normal


def _volume(place: str, given: object) -> Checked:
    volume = Bind(given) if isinstance(given, str | Path) else FsspecVolume(given) if is_filesystem(given) else given
    if isinstance(volume, Named):
        volume = volume.found()
        if isinstance(volume, Bind):
            make_directory(volume.path)
    if isinstance(volume, Bind):
        _check_source(place, volume)
        return evolve(volume, via=_way(place, volume))
    if isinstance(volume, DiskImage):
        _check_disk(place, volume)
    elif not isinstance(volume, FsspecVolume | ImageVolume | Tmpfs):
        raise ConfigError(f"volumes[{place!r}]={given!r} is no volume",
                          hint="a path, a filesystem of fsspec, Bind, Named, DiskImage, ImageVolume or Tmpfs")
    return volume


def _check_source(place: str, volume: Bind) -> None:
    path = volume.path
    if (kind := _kind_of(place, path)) is None:
        raise ConfigError(f"volumes[{place!r}]: there is no {str(path)!r}", hint="make it first, or correct the path")
    if kind not in (stat.S_IFDIR, stat.S_IFREG):
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} is neither a directory nor a file")
    if place.endswith("/") and kind != stat.S_IFDIR:
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} is a file, and the place ends in '/'",
                          hint="name a directory, or leave out the '/'")
    needed = os.R_OK | (os.X_OK if kind == stat.S_IFDIR else 0)
    if not os.access(path, needed):
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} may not be read by uid {os.geteuid()}",
                          hint="change its permissions, or run as its owner")
    if volume.security == "mapped-xattr":
        _check_attributes(place, volume)


def _kind_of(place: str, path: Path) -> int | None:
    """What is at a path of this machine, as stat(2) has it; None for nothing. Raises ConfigError."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        hint = f"uid {os.geteuid()} has to be let into the directories that lead there" if exc.errno == errno.EACCES \
            else "correct the path"
        raise ConfigError(f"volumes[{place!r}]: can't look at {str(path)[:200]!r}: {exc.strerror}", hint=hint) from exc


def _check_attributes(place: str, volume: Bind) -> None:
    """That the filesystem keeps them. Whether a file has some doesn't matter."""
    try:
        os.getxattr(volume.path, "user.virtfs.uid")
    except OSError as exc:
        if exc.errno == errno.ENOTSUP:
            raise ConfigError(f"volumes[{place!r}]: the filesystem of {str(volume.path)!r} has no extended attributes",
                              hint='security="mapped-file" keeps them in files') from exc


def _check_disk(place: str, volume: DiskImage) -> None:
    path, kind = volume.path, _kind_of(place, volume.path)
    if kind is None and path.is_symlink():
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} is a link to {os.readlink(path)!r}, and nothing is there",
                          hint="name the path that it leads to, or remove the link")
    if kind is None and volume.format != "raw":
        raise ConfigError(f"volumes[{place!r}]: there is no {str(path)!r}",
                          hint=f"only raw disks are made: convert one, by qemu-img convert -O {volume.format}")
    if kind is None and (volume.size is None or volume.readonly or _kind_of(place, path.parent) != stat.S_IFDIR):
        raise ConfigError(f"volumes[{place!r}]: there is no {str(path)!r}",
                          hint="size= makes it, for writing, in a directory that is there")
    if kind not in (None, stat.S_IFREG, stat.S_IFBLK):
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} is neither a file nor a block device",
                          hint="a directory is a Bind")
    if volume.device == "pmem" and kind != stat.S_IFREG:
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} is a block device, and device='pmem' maps files only")
    if volume.device == "pmem" and ((size := path.stat().st_size) % PMEM_UNIT or not size):
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} has {size} bytes, no multiple of 2 MiB",
                          hint=f"device='pmem' maps as much at a time: truncate --size=%2M {path}")


def _way(place: str, volume: Bind) -> Literal["virtiofs", "9p"]:
    """How the guest gets it, of the ways that there are here."""
    if volume.via == "virtiofs":
        return volume.via
    if volume.via == "auto":
        try:
            daemon()
        except ToolMissingError as missing:
            if volume.path.is_dir():
                return "9p"
            raise ConfigError(f"volumes[{place!r}]: a file needs virtio-fs, and {missing.message}",
                              hint=missing.hint) from missing
        return "virtiofs"
    if not volume.path.is_dir():
        raise ConfigError(f"volumes[{place!r}]: {str(volume.path)!r} is a file, and 9p shares directories only",
                          hint='via="virtiofs" shares files, too')
    return "9p"
