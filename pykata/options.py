"""What a caller may ask of a sandbox, checked before anything starts."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, field, frozen

from pykata.errors import ConfigError, ImageReferenceError
from pykata.fs.base import SharedFs
from pykata.hypervisors.base import Hypervisor
from pykata.net.network import Network
from pykata.net.none import NoNetwork
from pykata.origin import Origin
from pykata.spec import Isolation, Progress, PullPolicy, Registries, TemplatePolicy, Terminal
from pykata.volumes import Bind, Checked, Tmpfs

if TYPE_CHECKING:
    from pykata.spares import Spares

MIN_MEMORY = 64
"""MiB. The guest's kernel and agent take about 40; below this the first container would be killed for memory."""

MIN_DISK = 64 * 1024
"""Bytes. The directories that a container's writable layer begins with take some pages."""

MAX_NAME = 63
MAX_SIGNAL = 64

Rlimits = Mapping[str, int | tuple[int, int]]
"""Limits by name, such as ``{"nofile": 1024, "core": (0, -1)}``: soft and hard at once, or both; -1 is none."""

RLIMITS = (
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio",
    "rttime", "sigpending", "stack",
)  # fmt: skip
"""getrlimit(2)."""
UNLIMITED = 2**64 - 1

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?", re.IGNORECASE)
_ENV_NAME = re.compile(r"[^=\0]+")


def is_text(value: object) -> bool:
    """Whether a process can be given it: text without NUL that UTF-8 can say, so without a lone surrogate."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_seconds(name: str, value: object) -> float | None:
    """A duration in seconds, or None for no limit."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
        return float(value)
    raise ConfigError(f"{name}={value!r:.80} is not a duration", hint="give seconds as a number above 0, or None")


def check_patience(name: str, value: object) -> float:
    """Seconds that one may wait; 0 is not at all."""
    return 0.0 if value == 0 and not isinstance(value, bool) else check_seconds(name, value) or float("inf")


def check_env(env: Mapping[str, str] | None) -> dict[str, str]:
    """Environment variables, each a name without ``=`` and a value without NUL."""
    if env is not None and not isinstance(env, Mapping):
        raise ConfigError(f"env={env!r} is not a mapping", hint='give {"NAME": "value"}')
    for key, value in (env or {}).items():
        if not is_text(key) or not _ENV_NAME.fullmatch(key):
            raise ConfigError(f"env has a name {key!r} that no process can have", hint="UTF-8, no '=', not empty")
        if not is_text(value):
            raise ConfigError(f"env[{key!r}]={value!r} is not text in UTF-8 without NUL")
    return dict(env or {})


def check_cmd(cmd: Sequence[str] | None, name: str = "cmd") -> tuple[str, ...] | None:
    """A command as argv, or None for the image's own; ``name`` is what the argument is called."""
    if cmd is None:
        return None
    if isinstance(cmd, str | bytes):
        raise ConfigError(f"{name}={cmd!r} is one string", hint='give a list of arguments, e.g. ["sh", "-c", "..."]')
    if not isinstance(cmd, Iterable):
        raise ConfigError(f"{name}={cmd!r} is not a list of arguments")
    args = tuple(cmd)
    if not args or args[0] == "":
        raise ConfigError(f"{name}={cmd!r} is empty", hint=f"name a program, or leave {name} out for the image's own")
    for arg in args:
        if not is_text(arg):
            raise ConfigError(f"{name} has an argument {arg!r} that is not text in UTF-8 without NUL")
    return args


def check_cwd(cwd: str | None) -> str:
    """A working directory: an absolute path in the container; empty for the image's own."""
    if cwd is None or cwd == "":
        return ""
    if not is_text(cwd) or not cwd.startswith("/"):
        raise ConfigError(f"cwd={cwd!r} is not an absolute path in the container")
    return cwd


def check_user(user: str | None) -> str:
    """Who to run as; empty for the image's own."""
    if user is not None and not is_text(user):
        raise ConfigError(f"user={user!r} is not a user", hint='give "name", "uid", "name:group" or "uid:gid"')
    return user or ""


def check_terminal(tty: bool | Terminal) -> Terminal | None:
    """The terminal to make, or None."""
    if isinstance(tty, bool):
        return Terminal() if tty else None
    if not isinstance(tty, Terminal):
        raise ConfigError(f"tty={tty!r} is neither a bool nor a Terminal", hint="e.g. tty=Terminal(rows=50, cols=132)")
    check_terminal_size(tty.rows, tty.cols)
    return tty


def check_terminal_size(rows: object, cols: object) -> None:
    """A size that a terminal can have."""
    for name, value in (("rows", rows), ("cols", cols)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
            raise ConfigError(f"{name}={value!r} is not a size of a terminal", hint="from 1 to 65535")


def check_signal(number: object, *, least: int = 1) -> int:
    """A signal's number, or 0 for none where that is the ``least``. Raises :class:`ConfigError` for what is none."""
    if isinstance(number, int) and not isinstance(number, bool) and least <= number <= MAX_SIGNAL:
        return int(number)
    wrong = f"signal {number!r:.80} is not a signal's number"
    raise ConfigError(wrong, hint=f"from {least} to {MAX_SIGNAL}: signal.SIGTERM")


def check_rlimits(rlimits: Rlimits | None) -> tuple[tuple[str, int, int], ...]:
    """Resource limits as the kernel's name for each, soft and hard."""
    if rlimits is not None and not isinstance(rlimits, Mapping):
        raise ConfigError(f"rlimits={rlimits!r} is not a mapping", hint='give {"nofile": 1024}')
    return tuple(_rlimit(name, value) for name, value in (rlimits or {}).items())


def _rlimit(name: str, value: int | tuple[int, int]) -> tuple[str, int, int]:
    if name not in RLIMITS:
        raise ConfigError(f"rlimits has a limit {name!r} that doesn't exist", hint=f"there are {', '.join(RLIMITS)}")
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(each, int) and -1 <= each <= UNLIMITED for each in pair):
        raise ConfigError(f"rlimits[{name!r}]={value!r} is not a limit", hint="a number or (soft, hard); -1: no limit")
    soft, hard = (UNLIMITED if each == -1 else int(each) for each in pair)
    if soft > hard:
        raise ConfigError(f"rlimits[{name!r}]={value!r} has a soft limit above the hard one")
    return f"RLIMIT_{name.upper()}", soft, hard


def check_hostname(hostname: str) -> str:
    """A host name: one label of RFC 1123."""
    if not isinstance(hostname, str) or len(hostname) > MAX_NAME or not _LABEL.fullmatch(hostname):
        raise ConfigError(
            f"hostname={hostname!r} is not a host name",
            hint=f"letters, digits and inner hyphens, at most {MAX_NAME} characters",
        )
    return hostname


def check_image(image: str) -> str:
    """An image's name, whatever it is: what it names is looked for later."""
    if not isinstance(image, str):
        raise ImageReferenceError(
            f"image={image!r:.80} is not text", reference=repr(image)[:80], hint='"./images/app" for one on disk'
        )
    return image


def check_registries(registries: Registries | None) -> Registries | None:
    """How registries are reached."""
    if registries is not None and not isinstance(registries, Registries):
        raise ConfigError(f"registries={registries!r:.80} are no Registries", hint='Registries(insecure=("host",))')
    return registries


def check_progress(progress: Progress | None) -> Progress | None:
    """Who is told of a pull."""
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress={progress!r:.80} can't be called", hint="give a function of an event")
    return progress


def check_pull(pull: PullPolicy) -> PullPolicy:
    """When a registry is asked for an image."""
    if pull not in ("missing", "always", "never"):
        raise ConfigError(f"pull={pull!r} is unknown", hint='"missing", "always" or "never"')
    return pull


def check_isolation_wanted(isolation: Isolation | None) -> Isolation | None:
    """What shall keep the guest in; None is what the host has."""
    if isolation not in ("hardware", "emulated", None):
        raise ConfigError(f"isolation={isolation!r} is unknown", hint='"hardware", "emulated", or None for either')
    return isolation


def check_template(template: TemplatePolicy) -> TemplatePolicy:
    """Whether the sandbox may go on from a saved one of its kind."""
    if template not in ("auto", "off"):
        raise ConfigError(f"template={template!r} is unknown", hint='"auto", "off" or a Template')
    return template


def check_count(name: str, value: object) -> int:
    """How many of something: a whole number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} is not a whole number from 1 on")
    return value


def new_hostname() -> str:
    """A host name that no other sandbox has."""
    return f"pykata-{os.urandom(4).hex()}"


@frozen(kw_only=True)
class Options:
    """A sandbox as it was asked for; memory in MiB, the writable layer in bytes, times in seconds."""

    hypervisor: Hypervisor
    fs: SharedFs
    network: Network
    cpus: int
    memory: int
    disk: int
    hostname: str
    env: Mapping[str, str] = field(factory=dict)
    timeout: float | None = None
    boot_timeout: float = 60.0
    admission_timeout: float = 30.0
    isolation: Isolation | None = None
    pull: PullPolicy = "missing"
    registries: Registries | None = None
    progress: Progress | None = None
    template: TemplatePolicy = "auto"
    origin: Origin | None = field(default=None, repr=False)     # what it goes on from
    spares: Spares | None = field(default=None, repr=False)     # machines that have loaded it
    snapshot: Path | None = None                                # the same, on disk
    chosen: frozenset[str] = frozenset()                        # what need not be as it was saved there
    bare: bool = False                                          # from a template without containers
    signal: int = 0                                             # to the processes in what it goes on from
    volumes: Mapping[str, Checked] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self._check_cpus()
        if self.memory < MIN_MEMORY:
            raise ConfigError(
                f"memory={self.memory} MiB is too little for a guest",
                hint=f"at least {MIN_MEMORY} MiB",
            )
        if any(isinstance(volume, Bind) for volume in self.volumes.values()):
            features = self.hypervisor.features
            if not {"virtiofs", "9p"} & set(features.filesystems):
                raise ConfigError(f"volumes: {features.name} can't share directories of the host")
        if self.fs.shared and self.fs.name not in self.hypervisor.features.filesystems:
            name = self.hypervisor.features.name
            raise ConfigError(f"fs: {name} has no {self.fs.name}", hint='fs="block" always works')
        if self.uses_host and self.origin is not None:
            raise ConfigError("a sandbox with directories or disks of the host can't go on from a saved one")
        if self.network.strategy != NoNetwork() and self.snapshot is not None:
            raise ConfigError("network: a snapshot has none", hint="restore it without")
        if self.volumes and self.snapshot is not None:
            raise ConfigError("volumes: a snapshot has none", hint="restore it without, and copy files into it")
        if self.fs.shared and self.snapshot is not None:
            raise ConfigError(f"fs: a snapshot has no {self.fs.name}", hint="restore it without")
        if self.disk < MIN_DISK:
            raise ConfigError(
                f"disk={self.disk} bytes leaves nothing to write to", hint=f"at least {MIN_DISK // 1024}K"
            )

    @property
    def uses_host(self) -> bool:
        """Whether the machine has files that aren't in its own memory: it can't be saved then."""
        return self.fs.shared or bool(self.host_places)

    @property
    def host_places(self) -> list[str]:
        """The places of the volumes that aren't in the machine's own memory."""
        return [place for place, volume in self.volumes.items() if not isinstance(volume, Tmpfs)]

    def _check_cpus(self) -> None:
        if not isinstance(self.cpus, int) or isinstance(self.cpus, bool) or self.cpus < 1:
            raise ConfigError(f"cpus={self.cpus!r} is not a number of virtual CPUs", hint="a whole number from 1 on")
        features = self.hypervisor.features
        if self.cpus > features.max_cpus:
            raise ConfigError(f"cpus={self.cpus} is too many for {features.name}", hint=f"at most {features.max_cpus}")


def forked(options: Options, origin: Origin) -> Options:
    """Those of a sandbox that goes on from one with these."""
    return evolve(options, origin=origin, spares=None, snapshot=None, signal=0, hostname=new_hostname())
