"""Volumes: what a sandbox's containers have beside their images, and share."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from attrs import Attribute, evolve, field, frozen

from pykata.errors import ConfigError, ToolMissingError
from pykata.fs.ninep import directory
from pykata.fs.virtiofs import daemon, served
from pykata.sizes import parse_size
from pykata.spec import VOLUMES, Attachment, Mount, Shared

NOT_OVER = ("/", "/proc", "/sys", "/dev")
"""What belongs to the guest's kernel, or to the image as a whole."""

CACHES = ("auto", "always", "none")
MOST = 64               # volumes of a sandbox


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


def _count(instance: object, attribute: Attribute[int], value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"files={value!r} is not a number of files", hint="a whole number from 1 on")


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
    """

    path: Path = field(converter=_path)
    readonly: bool = False
    cache: Literal["auto", "always", "none"] = field(default="auto", validator=_one_of(*CACHES))
    via: Literal["auto", "virtiofs", "9p"] = field(default="auto", validator=_one_of("auto", "virtiofs", "9p"))


@frozen
class Tmpfs:
    """A volume in the guest's memory, empty at first, that the containers of one sandbox share.

    ``size`` is MiB or text such as ``"64M"``, ``files`` the most files and directories in it.
    """

    size: int | str = field(converter=_size)
    files: int = field(default=100_000, validator=_count)


Volume = Bind | Tmpfs


@frozen
class Place:
    """A volume in a container: where the agent has it, and where it shall be."""

    source: str
    destination: str
    readonly: bool


def check_volumes(volumes: Mapping[str, Volume | str | Path] | None) -> dict[str, Volume]:
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


def _volume(place: str, given: object) -> Volume:
    volume = Bind(given) if isinstance(given, str | Path) else given
    if isinstance(volume, Bind):
        _check_source(place, volume)
        return evolve(volume, via=_way(place, volume))
    if not isinstance(volume, Tmpfs):
        raise ConfigError(f"volumes[{place!r}]={given!r} is no volume", hint="a path, Bind(...) or Tmpfs(...)")
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


# --- in the guest ---


def places(volumes: Mapping[str, Volume]) -> list[Place]:
    """Where each volume is in the guest, and where it belongs in a container. The same in each process."""
    out = []
    for number, (place, volume) in enumerate(volumes.items()):
        if isinstance(volume, Bind):
            source = f"9p{number}" if volume.via == "9p" else f"{_tag(volume)}/{number}"
            out.append(Place(f"{VOLUMES}/{source}", place, volume.readonly))
        else:
            out.append(Place(f"{VOLUMES}/tmpfs{number}", place, readonly=False))
    return out


@asynccontextmanager
async def attached(volumes: Mapping[str, Volume], run_dir: Path) -> AsyncIterator[Attachment]:
    """All volumes, ready for a virtual machine. Raises HostError."""
    attachment = Attachment()
    for number, volume in enumerate(volumes.values()):
        if isinstance(volume, Tmpfs):
            attachment += Attachment(mounts=(_tmpfs(number, volume),))
        elif volume.via == "9p":
            attachment += directory(f"9p{number}", volume.path, readonly=volume.readonly, cache=volume.cache)
    async with AsyncExitStack() as stack:
        for cache in CACHES:
            shared = tuple(
                Shared(str(number), volume.path, volume.readonly) for number, volume in enumerate(volumes.values())
                if isinstance(volume, Bind) and volume.via == "virtiofs" and volume.cache == cache
            )  # fmt: skip
            if shared:
                attachment += await stack.enter_async_context(served(f"fs-{cache}", shared, cache, run_dir))
        yield attachment


def _tag(volume: Bind) -> str:
    return f"fs-{volume.cache}"


def _tmpfs(number: int, volume: Tmpfs) -> Mount:
    options = (f"size={volume.size}", f"nr_inodes={volume.files}", "mode=1777", "nosuid", "nodev")
    return Mount("tmpfs", "tmpfs", f"{VOLUMES}/tmpfs{number}", options)
