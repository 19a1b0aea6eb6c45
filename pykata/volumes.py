"""Volumes: what a sandbox's containers have beside their images, and share."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import Attribute, evolve, field, frozen
from attrs.converters import optional

from pykata.errors import ConfigError, HostError, ToolMissingError
from pykata.fs.virtiofs import daemon
from pykata.host import state_dir
from pykata.sizes import parse_size
from pykata.spec import MIB, PMEM_UNIT, DiskFormat, Security

NOT_OVER = ("/", "/proc", "/sys", "/dev")
"""What belongs to the guest's kernel, or to the image as a whole."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
CACHES = ("auto", "always", "none")
MOST = 64               # volumes of a sandbox
DISKS = ".disks"        # beside the named volumes: those that have a size


def _path(value: object) -> Path:
    if not isinstance(value, str | os.PathLike) or not (text := os.fspath(value)) or "\0" in str(text):
        raise ConfigError(f"volume {value!r} is not a path", hint="give a directory or a file of this machine")
    return Path(os.path.abspath(os.fsdecode(text)))


def _one_of(*choices: str) -> Any:
    def check(instance: object, attribute: Attribute[str], value: object) -> None:
        if value not in choices:
            raise ConfigError(f"{attribute.name}={value!r} is unknown", hint=f"one of {', '.join(map(repr, choices))}")

    return check


def _size(value: int | str) -> int:
    size = parse_size("size", value)
    if size < 4096:
        raise ConfigError(f"size={value!r} leaves nothing to write to")
    return size


def _inner_path(instance: object, attribute: Attribute[str], value: object) -> None:
    """A path in a filesystem that isn't this machine's."""
    if not isinstance(value, str) or "\0" in value or ".." in value.split("/"):
        raise ConfigError(f"{attribute.name}={value!r} is no path")


def _seconds(instance: object, attribute: Attribute[float], value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 3600:
        raise ConfigError(f"{attribute.name}={value!r} is not a duration", hint="seconds, above 0 and below an hour")


def _count(instance: object, attribute: Attribute[int], value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"files={value!r} is not a number of files", hint="a whole number from 1 on")


def _unlimited(instance: object, attribute: Attribute[None], value: object) -> None:
    if value is not None:
        raise ConfigError(f"{attribute.name}={value!r}: a directory of this machine has no limit of its own",
                          hint="Named('NAME', size=, files=) and DiskImage(PATH, size=, files=) have one")


def _security(instance: Bind | Named, attribute: Attribute[str], value: object) -> None:
    """QEMU's security models."""
    if value == "passthrough":
        raise ConfigError("security='passthrough' is not offered: the VMM would need the right to give files away",
                          hint='"mapped-xattr" keeps what a guest says of its files, and gives nothing away')
    _one_of("none", "mapped-xattr", "mapped-file")(instance, attribute, value)
    if value != "none" and instance.via != "9p":
        raise ConfigError(f"security={value!r} is for 9p, and via={instance.via!r}",
                          hint='via="9p"; virtio-fs keeps owners and modes as they are')


@frozen
class Bind:
    """A directory or a file of the host as a volume.

    ::

        Sandbox(volumes={"/data": Bind("./data", readonly=True)})

    ``readonly`` is enforced by the host's kernel. ``cache`` says what the guest may take for granted: with ``"auto"``
    it looks at a file's metadata again after a second, and at its content when the file is opened; with ``"always"``
    it never does, which is fastest and right for what nobody else changes; with ``"none"`` it keeps nothing, and a
    program can't ``mmap`` a file to share it.

    ``via="virtiofs"`` is served by a ``virtiofsd`` in namespaces of its own, which sees nothing but the volumes. A
    guest's root is the user who runs this; other users are as well if that is root, and else nobody: they can't make
    files. ``via="9p"`` is served by the VMM; it is slower and takes directories only, and all that is made belongs to
    the directory's owner. ``"auto"`` is virtio-fs if there is a virtiofsd.

    ``security`` is how 9p keeps what a guest says of a file. With ``"none"`` a guest can't change an owner, nor make a
    FIFO, a socket or a device. With ``"mapped-xattr"`` it can: owner, mode and kind are in extended attributes
    (``user.virtfs.*``) that it doesn't see, the files here are plain ones that only the directory's owner may read, and
    so is what are symbolic links there; links that were made here lead nowhere. With ``"mapped-file"`` they are in
    files beside them (``.virtfs_metadata``), for filesystems without attributes.

    A guest that may write can fill the filesystem that the directory is on, with bytes and with files: ``size`` and
    ``files`` are refused here, and :class:`Named` and :class:`DiskImage` have them.
    """

    path: Path = field(converter=_path)
    readonly: bool = False
    cache: Literal["auto", "always", "none"] = field(default="auto", validator=_one_of(*CACHES))
    via: Literal["auto", "virtiofs", "9p"] = field(default="auto", validator=_one_of("auto", "virtiofs", "9p"))
    security: Security = field(default="none", kw_only=True, validator=_security)
    size: None = field(default=None, kw_only=True, repr=False, validator=_unlimited)
    files: None = field(default=None, kw_only=True, repr=False, validator=_unlimited)


@frozen
class Tmpfs:
    """A volume in the guest's memory, empty at first, that the containers of one sandbox share.

    ``size`` is MiB or text such as ``"64M"``, ``files`` the most files and directories in it.
    """

    size: int | str = field(converter=_size)
    files: int = field(default=100_000, validator=_count)


def _name(instance: object, attribute: Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ConfigError(f"{value!r} is no name of a volume",
                          hint="letters, digits, '_', '.' and '-', the first a letter or digit; at most 63 characters")


def _disk_size(value: int | str | None) -> int | None:
    if value is None:
        return None
    size = parse_size("size", value)
    if size < 4 * MIB:
        raise ConfigError(f"size={value!r} is too small for a filesystem", hint="at least 4M")
    return size


def _optional_count(instance: object, attribute: Attribute[int | None], value: Any) -> None:
    if value is not None:
        _count(instance, attribute, value)  # type: ignore[arg-type]


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

    name: str = field(validator=_name)
    readonly: bool = False
    cache: Literal["auto", "always", "none"] = field(default="auto", validator=_one_of(*CACHES))
    via: Literal["auto", "virtiofs", "9p"] = field(default="auto", validator=_one_of("auto", "virtiofs", "9p"))
    size: int | str | None = None
    files: int | None = field(default=None, validator=_optional_count)
    security: Security = field(default="none", kw_only=True, validator=_security)

    def __attrs_post_init__(self) -> None:
        _disk_size(self.size)
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
        disk.parent.mkdir(mode=0o700, exist_ok=True)
        return DiskImage(disk, self.size, self.files, self.readonly)


def list_volumes() -> list[str]:
    """The names of the volumes that this user has."""
    folders = (_folder(), _folder() / DISKS)
    return sorted(path.name for folder in folders for path in folder.glob("*") if not path.name.startswith("."))


def remove_volume(name: str) -> None:
    """Remove a named volume and all that is in it. Raises ConfigError if there is none."""
    volume = Named(name).found()
    if isinstance(volume, DiskImage):
        volume.path.unlink()        # who uses it goes on with what is nobody else's then
        return
    path = volume.path
    # Out of the way first: who comes now gets a new one. What can't be removed then goes with the next removal.
    gone = path.with_name(f".{name}-{os.urandom(4).hex()}")
    try:
        path.rename(gone)
    except FileNotFoundError:
        known = ", ".join(list_volumes()) or "none"
        raise ConfigError(f"there is no volume {name!r}", hint=f"there are {known}") from None
    import shutil

    try:
        shutil.rmtree(gone)
    except OSError as exc:
        raise HostError(f"volume {name!r} can't be removed whole: {exc}", hint=f"remove {gone}") from exc


def _folder() -> Path:
    path = state_dir() / "volumes"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@frozen
class DiskImage:
    """A filesystem of its own as a volume: in a file of the host, or on a block device.

    ::

        Sandbox(volumes={"/data": DiskImage("./data.img", size="1G", files=10_000)})

    It is an ext4, squashfs or erofs, whole. ``format`` is what it is kept as, and is never guessed: raw, or a
    ``"qcow2"`` that is there, and that names no other file (no backing file, no external data). A raw file that is
    missing is made, an empty ext4 of ``size`` (MiB or text) with room for ``files`` files and directories, about: a
    guest can use that up and no more. The file takes as much space as was written. One sandbox can write to it at a
    time, or several read it (``readonly``).

    ``device="pmem"`` is for a raw file that is only read, an erofs or ext4 whose size is a multiple of 2 MiB: the guest
    maps its pages, which are the host's page cache, rather than copy them, so that all guests share them. It needs
    ``QEMU(machine="q35")``.

    What a container wrote is on the disk when the container is gone. Of a sandbox that ends before, the last seconds
    may be lost, as with a machine whose power fails.
    """

    path: Path = field(converter=_path)
    size: int | str | None = field(default=None, converter=_disk_size)
    files: int | None = field(default=None, validator=_optional_count)
    readonly: bool = False
    format: DiskFormat = field(default="raw", validator=_one_of("raw", "qcow2"))
    device: Literal["blk", "pmem"] = field(default="blk", validator=_one_of("blk", "pmem"))

    def __attrs_post_init__(self) -> None:
        if self.device == "pmem" and (not self.readonly or self.format != "raw"):
            raise ConfigError("device='pmem' is for raw disks that are only read", hint="readonly=True, format='raw'")


def _filesystem(instance: object, attribute: object, value: object) -> None:
    if not is_filesystem(value):
        raise ConfigError(f"{value!r} is no filesystem of fsspec", hint='such as fsspec.filesystem("memory")')


def is_filesystem(value: object) -> bool:
    """Whether it is a filesystem of fsspec's. Who has one has imported fsspec."""
    spec = sys.modules.get("fsspec.spec")
    return spec is not None and isinstance(value, spec.AbstractFileSystem)


@frozen
class FsspecVolume:
    """A filesystem of fsspec as a volume: memory, zip, S3, one of your own. Nothing of it comes onto a disk here.

    ::

        Sandbox(volumes={"/data": FsspecVolume(fsspec.filesystem("memory"), "/inputs", readonly=True)})

    This process serves ``path`` in it and what is below, as long as the sandbox is open. A request that takes longer
    than ``timeout`` seconds fails in the guest with ETIMEDOUT, one that raises with the errno of what it raises. Files
    have no owner and no mode: everybody may read and write all of them, unless ``readonly``.

    A file that is written to is kept in memory and handed over when it is closed: ``buffer`` is how much of that there
    may be (MiB or text), beyond it the guest gets ENOSPC. An error then is seen by who calls fsync(2). ``cache`` is as
    for :class:`Bind`.

    A guest may add ``size`` (MiB or text) to what is there, and ``files`` files and directories, before it gets ENOSPC;
    what it removes it may add again. Without them it may add what it likes.
    """

    fs: Any = field(validator=_filesystem)
    path: str = field(default="", validator=_inner_path)
    readonly: bool = False
    cache: Literal["auto", "always", "none"] = field(default="auto", validator=_one_of(*CACHES))
    timeout: float = field(default=30.0, validator=_seconds)
    buffer: int | str = field(default="256M", converter=_size)
    size: int | str | None = field(default=None, kw_only=True, converter=optional(_size))
    files: int | None = field(default=None, kw_only=True, validator=_optional_count)


def _reference(instance: object, attribute: Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{value!r} is no name of an image", hint='such as "python:3.12-slim" or "dir:./rootfs"')


@frozen
class ImageVolume:
    """The files of an image as a volume, read-only: data or programs beside the image that runs.

    ::

        Sandbox(volumes={"/opt/model": ImageVolume("registry.example/model:3")})

    The image is found as for :meth:`Sandbox.run` when the sandbox is entered, and attached as a disk that all sandboxes
    share.
    """

    image: str = field(validator=_reference)


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
    # One below another comes after it, or it would be hidden.
    return dict(sorted(checked.items()))


def _destination(place: object) -> str:
    hint = 'give an absolute path in the container, such as "/data"'
    if not isinstance(place, str) or not place.startswith("/") or "\0" in place:
        raise ConfigError(f"volumes has a place {place!r} that is no absolute path", hint=hint)
    if ".." in place.split("/"):
        raise ConfigError(f"volumes has a place {place!r} with '..' in it", hint=hint)
    normal = "/" + "/".join(part for part in place.split("/") if part not in ("", "."))
    if len(normal.encode()) > 1024:
        raise ConfigError(f"volumes has a place of {len(normal)} characters", hint="at most 1024 bytes")
    if normal == "/" or normal.startswith(tuple(f"{top}/" for top in NOT_OVER[1:])) or normal in NOT_OVER:
        raise ConfigError(f"volumes has a place {place!r}, over what belongs to the guest's kernel or is the image",
                          hint="choose a path that is not /, and not in /proc, /sys or /dev")
    return normal


def _volume(place: str, given: object) -> Checked:
    volume = Bind(given) if isinstance(given, str | Path) else FsspecVolume(given) if is_filesystem(given) else given
    if isinstance(volume, Named):
        volume = volume.found()
        if isinstance(volume, Bind):
            volume.path.mkdir(mode=0o755, exist_ok=True)
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
    if not path.exists():
        raise ConfigError(f"volumes[{place!r}]: there is no {str(path)!r}", hint="make it first, or correct the path")
    if not path.is_dir() and not path.is_file():
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} is neither a directory nor a file")
    if place.endswith("/") and not path.is_dir():
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} is a file, and the place ends in '/'",
                          hint="name a directory, or leave out the '/'")
    needed = os.R_OK | (os.X_OK if path.is_dir() else 0)
    if not os.access(path, needed):
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} may not be read by uid {os.geteuid()}",
                          hint="change its permissions, or run as its owner")
    if volume.security == "mapped-xattr":
        _check_attributes(place, volume)


def _check_attributes(place: str, volume: Bind) -> None:
    """That the filesystem keeps them. Whether a file has some doesn't matter."""
    try:
        os.getxattr(volume.path, "user.virtfs.uid")
    except OSError as exc:
        if exc.errno == errno.ENOTSUP:
            raise ConfigError(f"volumes[{place!r}]: the filesystem of {str(volume.path)!r} has no extended attributes",
                              hint='security="mapped-file" keeps them in files') from exc


def _check_disk(place: str, volume: DiskImage) -> None:
    path = volume.path
    if not path.exists() and volume.format != "raw":
        raise ConfigError(f"volumes[{place!r}]: there is no {str(path)!r}",
                          hint=f"only raw disks are made: convert one, by qemu-img convert -O {volume.format}")
    if not path.exists() and (volume.size is None or volume.readonly or not path.parent.is_dir()):
        raise ConfigError(f"volumes[{place!r}]: there is no {str(path)!r}",
                          hint="size= makes it, for writing, in a directory that is there")
    if path.exists() and not path.is_file() and not path.is_block_device():
        raise ConfigError(f"volumes[{place!r}]: {str(path)!r} is neither a file nor a block device",
                          hint="a directory is a Bind")
    if volume.device == "pmem" and not path.is_file():
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
