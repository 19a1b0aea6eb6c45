"""What the processes around a keeper hand each other as pickles: all are of one user and one version of pykata."""

from __future__ import annotations

import io
import os
import pickle
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from attrs import frozen

from pykata.command import Command
from pykata.errors import ConfigError, DetachedError
from pykata.guest import Bundle
from pykata.options import Options
from pykata.spec import Accel, Image, Port, Timings

T = TypeVar("T")


@frozen(kw_only=True)
class Request:
    """What a keeper shall keep: a sandbox, and in it a container of ``image``, and in that ``command``, if given."""

    name: str
    options: Options
    image: str | None = None
    command: Command | None = None


@frozen(kw_only=True)
class Welcome:
    """What a client needs to know of a running sandbox, beside the way to its agent."""

    options: Options
    bundle: Bundle
    run_dir: Path
    accel: Accel
    vmm: int
    spawned_at: float
    ready_at: float
    memory_limit: int
    entered: float
    timings: Timings
    console: str
    ports: tuple[Port, ...]
    addresses: tuple[str, ...]
    via: str
    has_policy: bool
    main: tuple[str, Image] | None
    """Id and image of the container that was asked for at the start."""


def to_descriptor(value: object) -> int:
    """A file in memory that holds the value; the caller closes it. Raises ConfigError for what can't be handed over."""
    try:
        data = pickle.dumps((_version(), value))
    except Exception as exc:  # whatever a __reduce__ raises
        raise ConfigError(
            f"these options can't be handed to another process: {exc}",
            hint="a strategy must be a value of a class in a module that can be imported",
        ) from exc
    descriptor = os.memfd_create("pykata", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def from_descriptor(descriptor: int, kind: type[T]) -> T:
    """The value in a file of :func:`to_descriptor`, which stays open."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        data = file.read()
    try:
        theirs, value = pickle.load(io.BytesIO(data))
    except Exception as exc:  # whatever another version left there
        said = f"what the other process sent can't be read: {exc}"
        raise DetachedError(said, hint="is it of another version of pykata?") from exc
    if not isinstance(value, kind):
        raise DetachedError(f"the other process runs pykata {theirs}, and this one {_version()}")
    return value


def _version() -> str:
    try:
        return version("pykata")
    except PackageNotFoundError:
        return "unknown"
