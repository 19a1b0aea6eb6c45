"""Checks of what volumes are made with: validators and converters of their fields. Each raises ConfigError."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from attrs import Attribute

from pykata.errors import ConfigError
from pykata.paths import check_path
from pykata.sizes import parse_size
from pykata.spec import MIB

MOST_FILES = 2**31      # a filesystem counts them in 32 bits

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def path(value: object) -> Path:
    return Path(os.path.abspath(check_path("path", value, "give a directory or a file of this machine")))


def one_of(*choices: str) -> Any:
    def check(instance: object, attribute: Attribute[str], value: object) -> None:
        if value not in choices:
            raise ConfigError(f"{attribute.name}={value!r} is unknown", hint=f"one of {', '.join(map(repr, choices))}")

    return check


def flag(instance: object, attribute: Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name}={value!r} is neither True nor False")


def size(value: int | str) -> int:
    return _writable("size", value)


def buffer(value: int | str) -> int:
    return _writable("buffer", value)


def _writable(name: str, value: int | str) -> int:
    given = parse_size(name, value)
    if given < 4096:
        raise ConfigError(f"{name}={value!r} leaves nothing to write to")
    return given


def optional_size(value: int | str | None) -> int | None:
    return None if value is None else size(value)


def inner_path(instance: object, attribute: Attribute[str], value: object) -> None:
    """A path in a filesystem that isn't this machine's."""
    if not isinstance(value, str) or "\0" in value or ".." in value.split("/"):
        raise ConfigError(f"{attribute.name}={value!r} is no path")


def seconds(instance: object, attribute: Attribute[float], value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 3600:
        raise ConfigError(f"{attribute.name}={value!r} is not a duration", hint="seconds, above 0 and below an hour")


def count(instance: object, attribute: Attribute[int], value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_FILES:
        raise ConfigError(f"{attribute.name}={value!r} is not a number of files",
                          hint=f"a whole number from 1 to {MOST_FILES}")


def unlimited(instance: object, attribute: Attribute[None], value: object) -> None:
    if value is not None:
        raise ConfigError(f"{attribute.name}={value!r}: a directory of this machine has no limit of its own",
                          hint="Named('NAME', size=, files=) and DiskImage(PATH, size=, files=) have one")


def security(instance: Any, attribute: Attribute[str], value: object) -> None:
    """QEMU's security models."""
    if value == "passthrough":
        raise ConfigError("security='passthrough' is not offered: the VMM would need the right to give files away",
                          hint='"mapped-xattr" keeps what a guest says of its files, and gives nothing away')
    one_of("none", "mapped-xattr", "mapped-file")(instance, attribute, value)
    if value != "none" and instance.via != "9p":
        raise ConfigError(f"security={value!r} is for 9p, and via={instance.via!r}",
                          hint='via="9p"; virtio-fs keeps owners and modes as they are')


def name(instance: object, attribute: Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ConfigError(f"{value!r} is no name of a volume",
                          hint="letters, digits, '_', '.' and '-', the first a letter or digit; at most 63 characters")


def disk_size(value: int | str | None) -> int | None:
    if value is None:
        return None
    given = parse_size("size", value)
    if given < 4 * MIB:
        raise ConfigError(f"size={value!r} is too small for a filesystem", hint="at least 4M")
    return given


def filesystem(instance: object, attribute: object, value: object) -> None:
    if not is_filesystem(value):
        raise ConfigError(f"{value!r} is no filesystem of fsspec", hint='such as fsspec.filesystem("memory")')


def is_filesystem(value: object) -> bool:
    """Whether it is a filesystem of fsspec's. Who has one has imported fsspec."""
    spec = sys.modules.get("fsspec.spec")
    return spec is not None and isinstance(value, spec.AbstractFileSystem)


def reference(instance: object, attribute: Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{value!r} is no name of an image", hint='such as "python:3.12-slim" or "dir:./rootfs"')
