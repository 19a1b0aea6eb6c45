"""The kinds of volumes, as values: what a caller gives, checked where it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from attrs import field, frozen, validators

from pykata.errors import ConfigError
from pykata.spec import DiskFormat, Security
from pykata.volumes import checks

Cache = Literal["auto", "always", "none"]
"""What a guest may take for granted of files that others change."""
Via = Literal["auto", "virtiofs", "9p"]
"""How a guest gets a directory of the host."""
CACHES: tuple[Cache, ...] = get_args(Cache)
VIAS: tuple[Via, ...] = get_args(Via)


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

    path: Path = field(converter=checks.path)
    readonly: bool = field(default=False, validator=checks.flag)
    cache: Cache = field(default="auto", validator=checks.one_of(*CACHES))
    via: Via = field(default="auto", validator=checks.one_of(*VIAS))
    security: Security = field(default="none", kw_only=True, validator=checks.security)
    size: None = field(default=None, kw_only=True, repr=False, validator=checks.unlimited)
    files: None = field(default=None, kw_only=True, repr=False, validator=checks.unlimited)


@frozen
class Tmpfs:
    """A volume in the guest's memory, empty at first, that the containers of one sandbox share.

    ``size`` is MiB or text such as ``"64M"``, ``files`` the most files and directories in it.
    """

    size: int | str = field(converter=checks.size)
    files: int = field(default=100_000, validator=checks.count)


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

    path: Path = field(converter=checks.path)
    size: int | str | None = field(default=None, converter=checks.disk_size)
    files: int | None = field(default=None, validator=validators.optional(checks.count))
    readonly: bool = field(default=False, validator=checks.flag)
    format: DiskFormat = field(default="raw", validator=checks.one_of("raw", "qcow2"))
    device: Literal["blk", "pmem"] = field(default="blk", validator=checks.one_of("blk", "pmem"))

    def __attrs_post_init__(self) -> None:
        if self.device == "pmem" and (not self.readonly or self.format != "raw"):
            raise ConfigError("device='pmem' is for raw disks that are only read", hint="readonly=True, format='raw'")


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

    fs: Any = field(validator=checks.filesystem)
    path: str = field(default="", validator=checks.inner_path)
    readonly: bool = field(default=False, validator=checks.flag)
    cache: Cache = field(default="auto", validator=checks.one_of(*CACHES))
    timeout: float = field(default=30.0, validator=checks.seconds)
    buffer: int | str = field(default="256M", converter=checks.buffer)
    size: int | str | None = field(default=None, kw_only=True, converter=checks.optional_size)
    files: int | None = field(default=None, kw_only=True, validator=validators.optional(checks.count))


@frozen
class ImageVolume:
    """The files of an image as a volume, read-only: data or programs beside the image that runs.

    ::

        Sandbox(volumes={"/opt/model": ImageVolume("registry.example/model:3")})

    The image is found as for :meth:`Sandbox.run` when the sandbox is entered, and attached as a disk that all sandboxes
    share.
    """

    image: str = field(validator=checks.reference)
