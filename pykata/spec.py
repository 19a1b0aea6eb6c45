"""The frozen values that the parts of pykata hand each other. A leaf: it imports nothing of ours."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import IO, Literal, Protocol

from attrs import define, field, fields, frozen

Accel = Literal["kvm", "tcg"]
Isolation = Literal["hardware", "emulated"]
TemplatePolicy = Literal["auto", "off"]
Start = Literal["boot", "template", "fork", "snapshot"]
Reason = Literal["exit", "signal", "oom", "timeout", "vm_died"]
PullPolicy = Literal["missing", "always", "never"]
"""When a registry is asked: for an image that isn't here, every time, or not at all."""
StreamName = Literal["stdout", "stderr"]
Phase = Literal["starting", "running", "ended", "lost"]
DiskFormat = Literal["raw", "qcow2"]
"""What a disk is kept as. It is told and never guessed: a guest can write what it likes onto a raw disk."""
Security = Literal["none", "mapped-xattr", "mapped-file"]
"""Where 9p keeps what a guest says of its files: owner, mode and kind."""

MIB = 1024 * 1024


@frozen
class Terminal:
    """A terminal of so many ``rows`` and columns (``cols``), for ``tty=``."""

    rows: int = 24
    cols: int = 80


@frozen
class Disk:
    """A block device for the guest. ``tag`` is its name among the devices of an attachment.

    Who has a qcow2 here has made sure that it names no other file. With a ``descriptor``, the VMM gets the very file
    that is open there, whatever is at ``path`` by then.
    """

    tag: str
    path: Path
    format: DiskFormat = "raw"
    readonly: bool = True
    is_device: bool = False             # a block device of the host, and no file
    descriptor: int | None = None


@define(eq=False)
class LentSlot:
    """A disk slot of a running machine that nobody else needs at the moment, with the memory of a file in it."""

    serial: str
    is_lost: bool = False
    """The guest may still read it: it can't be given to anybody else."""


@frozen
class Nic:
    """A virtio network device. ``backend`` is QEMU's ``-netdev`` as a JSON-able mapping, without its id.

    ``beside`` are others, with their ids, that the backend leads to. ``through`` is a command that becomes the one
    after it, which is the VMM's.
    """

    tag: str
    mac: str
    backend: Mapping[str, object]
    fds: tuple[int, ...] = ()
    beside: tuple[Mapping[str, object], ...] = ()
    through: tuple[str, ...] = ()


@frozen
class Shared:
    """A directory or a file of the host that a guest gets, as ``name`` among others."""

    name: str
    path: Path
    readonly: bool = False


@frozen
class VhostFs:
    """A virtio-fs device that a daemon serves. ``connection`` leads to the daemon (vhost-user) and goes to the VMM."""

    tag: str
    connection: socket.socket


@frozen
class VhostNet:
    """A virtio network device whose packets a switch moves (vhost-user).

    ``place`` is a descriptor (O_PATH) of the socket to which the VMM connects, to be led to the switch. ``queues`` are
    pairs of them. Without ``offload`` the guest makes all checksums itself, and sends no packet that has to be cut up.
    """

    tag: str
    mac: str
    place: int
    queues: int = 1
    offload: bool = True


@frozen
class NineP:
    """A directory that the VMM itself serves by 9p: at a path, or an open one (``descriptor``), as it is.

    If it ``is_whole``, all that is below it is of one filesystem. ``security`` is where owners, modes and kinds of
    files are kept.
    """

    tag: str
    path: Path
    readonly: bool = False
    descriptor: int | None = None
    is_whole: bool = False
    security: Security = "none"


@frozen
class Pmem:
    """A file that the guest maps into its memory, read-only (virtio-pmem): its pages are the host's page cache.

    Its ``size`` is a multiple of :data:`PMEM_UNIT`. The guest knows it by its number among those of the machine.
    """

    tag: str
    path: Path
    size: int
    descriptor: int | None = None       # as of a disk


def place_of(disk: Disk | Pmem) -> Path:
    """Where to open it: what was looked at and locked, if it is open already, and not what has its name now."""
    return disk.path if disk.descriptor is None else Path(f"/proc/self/fd/{disk.descriptor}")


Device = Disk | Nic | VhostFs | VhostNet | NineP | Pmem

PMEM_UNIT = 2 * MIB
"""What a guest maps at a time (include/linux/mmzone.h, a subsection)."""

VOLUMES = "/run/pykata/volumes"
"""Where the agent mounts volumes in the guest, out of any container's sight."""


@frozen
class Mount:
    """A filesystem that the agent mounts in the guest.

    ``source`` is the tag of a device of the same attachment, or the name of a filesystem without one. ``target`` is an
    absolute path in the guest; it is empty for the lower layers of a rootfs, whose place the agent chooses.
    """

    source: str
    type: str
    target: str = ""
    options: tuple[str, ...] = ()


@frozen
class Route:
    """A route in the guest; an empty ``gateway`` means on link."""

    destination: str
    gateway: str = ""


@frozen
class Interface:
    """How the guest sets up the network device with this MAC address. ``mtu`` 0 leaves the device's own."""

    mac: str
    name: str
    mtu: int = 0
    addresses: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()    # IP address and MAC of who is known for good


@frozen
class Port:
    """A port of the guest (``guest``) that is published on the host's ``address``; ``host`` 0 is any free port."""

    guest: int
    host: int = 0
    address: str = "127.0.0.1"
    protocol: Literal["tcp", "udp"] = "tcp"


@frozen(kw_only=True)
class NetworkEvent:
    """What became of a connection that the guest tried to make, or of packets that it sent.

    ``time`` is seconds since the epoch. ``address`` and ``port`` are where it wanted to go, ``name`` by what name, if
    that is known; ``reason`` is one word for what denied it, and ``why`` says it in words. It happened ``count``
    times: what repeats within a second is told together.
    """

    time: float
    action: Literal["allowed", "denied"]
    protocol: str
    address: str = ""
    port: int = 0
    name: str = ""
    reason: str = ""
    why: str = ""
    count: int = 1


class Guard(Protocol):
    """What keeps a policy, seen from a running sandbox."""

    def events(self) -> AsyncIterator[NetworkEvent]:
        """Those from now on, for each who asks; the oldest are lost to a reader who is too slow."""

    async def allow(self, *rules: str) -> None:
        """Add what may be reached. Raises ConfigError."""

    async def deny(self, *rules: str) -> None:
        """Add what may not. Raises ConfigError."""


@frozen
class Served:
    """Files of the host behind a virtio-fs device, and the process that serves them."""

    tag: str
    ended: Callable[[], Awaitable[str]]
    """Waits until the process has ended, and says what happened."""
    of_images: bool = False
    """They are those of root filesystems, not of volumes."""


@frozen
class Attachment:
    """What a strategy adds to a virtual machine: devices, and what the agent makes of them.

    For a rootfs ``mounts`` are its read-only layers, topmost first.
    """

    devices: tuple[Device, ...] = ()
    mounts: tuple[Mount, ...] = ()
    content: tuple[str, ...] = ()
    """For a rootfs: directories below :data:`VOLUMES` that have the content which its layers say lies elsewhere."""
    interfaces: tuple[Interface, ...] = ()
    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    hosts: tuple[tuple[str, str], ...] = ()
    """Names and addresses for the containers' /etc/hosts."""
    published: tuple[Port, ...] = ()
    """With the ports that they really have."""
    guards: tuple[Guard, ...] = ()
    """By which a running sandbox's policy is changed."""
    via: tuple[str, ...] = ()
    """What makes the guest's connections, where there was a choice."""
    lost: tuple[Callable[[], Awaitable[str]], ...] = ()
    """Each waits until a process has ended without which the machine can't go on, and says what happened."""
    served: tuple[Served, ...] = ()
    """What a guest gets errors of when the process behind it has ended."""

    def __add__(self, other: Attachment) -> Attachment:
        return Attachment(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Attachment)))


@frozen
class Features:
    """What a hypervisor can do, known before anything starts."""

    name: str
    disk_slots: int                     # disks that can be plugged at the same time while the VM runs
    filesystems: tuple[str, ...]        # names of the shared filesystems that work with it
    networks: tuple[str, ...]
    templates: bool = False
    max_cpus: int = 1


@frozen
class SerialTransport:
    """A virtio-serial port named ``pykata.agent.0``; both ends of a socket pair, nothing on disk."""

    host: socket.socket
    vmm: socket.socket


@frozen
class VsockTransport:
    """A vsock listener on the host that the agent dials; the guest's CID is checked on accept.

    ``device`` is the open ``/dev/vhost-vsock`` to which the CID belongs. It goes to the VMM; who keeps a copy keeps the
    connection, after the VMM has ended.
    """

    listener: socket.socket
    port: int
    cid: int
    device: FileIO


Transport = SerialTransport | VsockTransport


class HeldFile(Protocol):
    """An open file of somebody else's, who may close it: its number may then be that of another one."""

    def fileno(self) -> int:
        """Its descriptor. Raises SandboxClosedError if it was closed."""
        ...


@frozen
class SavedVM:
    """A virtual machine that was stopped for a moment: any number of others can go on from there.

    ``file`` is a memfd that nobody can write to any more, ``memory`` its descriptor. Whoever made this closes it.
    ``slots`` are the disks that were plugged in, by the number of the slot. While it is still being saved, a machine
    can be started that waits for the devices to come by ``stream``. While it is still being loaded, one can be started
    that gets them when ``whole`` has returned: it waits for the memory, and raises SavedDamagedError. Until then
    ``is_loading`` says so.
    """

    file: HeldFile
    devices: bytes                      # what the VMM says of its devices
    slots: Mapping[int, Disk] = field(factory=dict)
    stream: socket.socket | None = None
    whole: Callable[[], Awaitable[None]] | None = None
    is_loading: Callable[[], bool] = bool       # False

    @property
    def memory(self) -> int:
        """Raises SandboxClosedError if it isn't there any more."""
        return self.file.fileno()


@frozen
class VMSpec:
    """A virtual machine to boot, or to go on with where another was ``saved``. Memory in MiB."""

    kernel: Path
    initrd: Path
    transport: Transport
    cpus: int = 1
    memory: int = 256
    devices: tuple[Device, ...] = ()
    boot_timeout: float = 60.0          # seconds, from when the boot got its slot
    saved: SavedVM | None = None
    paused: bool = False                # it executes nothing until it is resumed


@frozen
class ImageConfig:
    """The part of an OCI image's config that decides how a command runs (image-spec, config.md)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: Mapping[str, str] = field(factory=dict)
    user: str = ""                      # "", "name", "uid", "name:group", "uid:gid"
    workdir: str = "/"
    labels: Mapping[str, str] = field(factory=dict)
    stop_signal: str = ""


@frozen
class Image:
    """An image that was found, its metadata verified.

    ``digest`` identifies the content of its filesystem ("sha256:..."). Either ``disk`` is a filesystem image that is
    ready to be attached, or ``write_tar`` writes the merged layers as one tar stream: it blocks, so call it in a
    worker thread; it verifies every byte, and raises ImageError (and OSError for what the destination does). The
    destination's ``write`` must take all that it is given; its ``flush`` is called now and then also while there is
    nothing to write, so that it can end the work by raising. ``write_apart`` writes the tar without the content of its
    files, for overlayfs, and that as files below the directory that it is given; if the image is a
    ``directory``, None says that the content is what is there.
    """

    reference: str
    digest: str
    config: ImageConfig
    architecture: str
    write_tar: Callable[[IO[bytes]], None] | None = field(default=None, eq=False)
    write_apart: Callable[[IO[bytes], Path | None], None] | None = field(default=None, eq=False)
    directory: Path | None = field(default=None, eq=False)
    disk: Path | None = None
    disk_type: str = "squashfs"
    disk_format: DiskFormat = "raw"
    disk_is_device: bool = False


@frozen(kw_only=True)
class Registries:
    """How registries are reached, beyond what the files of Docker and Podman on this machine say.

    ::

        Registries(insecure=("registry.test:5000",), mirrors={"docker.io": ("mirror.test",)})

    ``insecure`` are hosts that may speak plain HTTP or have any certificate; those on this machine may anyway.
    ``mirrors`` are tried before the registry they are for, each a host with an optional path. ``ca_file`` has the
    certificates of further authorities (PEM). ``credentials`` are user and password by host, and win over those of
    files and helpers. ``timeout`` is in seconds, for a connection and between two pieces of an answer. A request is
    repeated ``retries`` times, as long as that makes no progress. ``parallel`` layers are downloaded at a time.
    """

    insecure: tuple[str, ...] = ()
    mirrors: Mapping[str, tuple[str, ...]] = field(factory=dict)
    ca_file: Path | None = None
    credentials: Mapping[str, tuple[str, str]] = field(factory=dict, repr=False)
    timeout: float = 30.0
    retries: int = 5
    parallel: int = 4


@frozen
class PullEvent:
    """A step of a pull. ``done`` and ``total`` are bytes of the layer ``digest``, as it is stored in the registry.

    ``status`` is ``"downloading"``, ``"retrying"``, ``"downloaded"`` (verified and stored), ``"exists"`` (it was here)
    or ``"converted"``: the image is ready, and ``digest`` is empty.
    """

    reference: str
    digest: str
    status: Literal["downloading", "retrying", "downloaded", "exists", "converted"]
    done: int = 0
    total: int = 0


@frozen
class BuildEvent:
    """A step of making an image: the ``number``-th of ``total``, in words.

    ``status`` is ``"cached"`` (it was made before), ``"running"``, ``"output"`` (its command wrote ``output``) or
    ``"done"``.
    """

    number: int
    total: int
    step: str
    status: Literal["cached", "running", "output", "done"]
    output: bytes = b""


Progress = Callable[[PullEvent], object]
"""Told each step of a pull, in the event loop of who asked for it."""


@frozen
class Timings:
    """Where the time of a start went, in seconds from entering the sandbox; what didn't happen is None.

    ``start`` is which way it went: the guest was booted, or goes on from one that was saved (without ``kernel`` and
    ``agent``, then; a machine that a template has kept ready is there as soon as there is a slot). ``why`` is why it
    was booted where a template could have been.
    """

    slot: float | None = None           # the boot got its slot
    spawned: float | None = None        # the VMM's process exists
    vmm_ready: float | None = None      # the VMM answers on its control channel
    kernel: float | None = None         # the guest's kernel started PID 1
    agent: float | None = None          # the agent serves
    ready: float | None = None          # Setup was answered: the sandbox is entered
    first_output: float | None = None   # the first byte of the first command's output
    start: Start = "boot"
    why: str = ""
