"""Directories and files of the host behind a virtio-fs device, served by a virtiofsd in a user namespace."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio.to_thread
from attrs import field, frozen

from pykata import host
from pykata.errors import ConfigError, HostError, ToolFailedError, ToolTooOldError
from pykata.fs.helper import entered
from pykata.fs.shelf import SHELF, SharedRoot, shelf_socket
from pykata.spec import VOLUMES, Attachment, Mount, Served, Shared, VhostFs

CACHES = ("auto", "always", "none")
NAMED = 3           # shares that a message names
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse", "fuseblk", "virtiofs")
"""File systems, as mountinfo names them, whose files this host's kernel passes on to somebody else. Those of FUSE may
also have a name of their own after a point."""


def _known(instance: object, attribute: object, value: object) -> None:
    if value not in CACHES:
        raise ConfigError(f"cache={value!r} is unknown", hint=f"one of {', '.join(map(repr, CACHES))}")


def daemon() -> Path:
    """The virtiofsd of this host: QEMU's, or the one written in Rust. Raises ToolMissingError."""
    return host.find_tool("virtiofsd", package="virtiofsd", env_var="PYKATA_VIRTIOFSD")


@frozen
class VirtioFS(SharedRoot):
    """The content of an image's files by virtio-fs; see :class:`~pykata.fs.shelf.SharedRoot`.

    ::

        Sandbox(fs=VirtioFS())

    It is served by a ``virtiofsd`` in namespaces of its own. ``cache`` is as for :class:`~pykata.Bind`; nothing changes
    the content of an image, so the guest may keep what it has read.
    """

    name = "virtiofs"
    cache: Literal["auto", "always", "none"] = field(default="always", validator=_known)

    @asynccontextmanager
    async def attach(self, run_dir: Path) -> AsyncIterator[Attachment]:
        with shelf_socket(run_dir) as shelf:
            async with served(SHELF, (), self.cache, run_dir, shelf) as attachment:
                yield attachment


@asynccontextmanager
async def served(
    tag: str, shares: Sequence[Shared], cache: str, run_dir: Path, shelf: socket.socket | None = None
) -> AsyncIterator[Attachment]:
    """A virtio-fs device ``tag`` with all of ``shares``, each at its name in a directory ``tag`` below
    :data:`~pykata.spec.VOLUMES`.

    Its daemon runs as long as the block; :attr:`~pykata.spec.Attachment.served` tells if it doesn't. By a listening
    ``shelf`` more can be added. Raises :class:`~pykata.errors.HostError`.
    """
    program = daemon()
    async with AsyncExitStack() as stack:
        root = run_dir / tag
        root.mkdir()
        listener, connection = _connected(run_dir / f"{tag}.sock")
        stack.callback(connection.close)
        with listener:
            alone = _alone(shares) if shelf is None else None
            source, target = (root / alone, f"{tag}/{alone}") if alone is not None else (root, tag)
            argv = [str(program), *options(
                listener.fileno(), source, cache, is_qemus=await _is_qemus(program),
                kills_privileges=not await anyio.to_thread.run_sync(_is_remote, shares),
            )]  # fmt: skip
            command = entered(root, shares, shelf, argv)
            given = (listener.fileno(),) if shelf is None else (listener.fileno(), shelf.fileno())
            process = await stack.enter_async_context(host.spawn(
                command, stderr=host.PIPE, pass_fds=given, cwd=Path("/"), env=host.TOOL_ENV, kill=host.KILL))
        said = host.LastWords(process, f"virtiofsd for {_named(shares)}")
        stack.push_async_callback(said.stop)
        yield Attachment(
            devices=(VhostFs(tag, connection),),
            mounts=(Mount(tag, "virtiofs", f"{VOLUMES}/{target}", ("nosuid", "nodev")),),
            served=(Served(tag, said.ended, of_images=shelf is not None),),
        )


def _alone(shares: Sequence[Shared]) -> str | None:
    """The name of the only share, if it is a directory: the daemon serves nothing else then, rather than what it is in.

    In a filesystem that the daemon announces within another one Linux forgets that the daemon takes privileges away
    (``SB_NOSEC`` isn't inherited in fs/fuse/inode.c), and asks for them before each write again.
    """
    return shares[0].name if len(shares) == 1 and shares[0].path.is_dir() else None


def _is_remote(shares: Sequence[Shared]) -> bool:
    """Whether files of these are in another kernel's hands, or a program's: only that takes privileges away there.

    Raises HostError for what isn't there any more.
    """
    kinds = set[str]()
    for share in shares:
        try:
            kinds |= host.kinds_below(share.path)
        except OSError as exc:
            raise HostError(f"can't share {share.path}: {exc.strerror}") from exc
    return any(kind in REMOTE or kind.startswith("fuse.") for kind in kinds)


def _named(shares: Sequence[Shared]) -> str:
    """What its end is told with: who has several wants to know which is meant."""
    paths = [str(share.path) for share in shares[:NAMED]]
    more = len(shares) - len(paths)
    return ", ".join(paths) + (f" and {more} more" if more else "") if paths else "images"


def _connected(path: Path) -> tuple[socket.socket, socket.socket]:
    """A listening socket for the daemon, and our connection to it, which waits there. No name of it is left."""
    listener, connection = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    try:
        with host.short_name(path.parent) as directory:
            listener.bind(f"{directory}/{path.name}")
            listener.listen(1)
            connection.connect(f"{directory}/{path.name}")
        path.unlink()
    except OSError as exc:
        listener.close()
        connection.close()
        raise HostError(f"can't make a socket for virtiofsd: {exc}") from exc
    return listener, connection


async def _is_qemus(program: Path) -> bool:
    """Whether it is the virtiofsd of QEMU 7.2 and before, written in C, rather than the one written in Rust.

    Raises :class:`~pykata.errors.ToolTooOldError` for one that doesn't know the options that we need.
    """
    found = await anyio.to_thread.run_sync(program.stat)
    key = (program, found.st_mtime_ns, found.st_size)
    if key not in _kinds:
        said = await host.run_tool([program, "--version"], timeout=10, limit=4096)
        _kinds[key] = _kind_of(program, said.decode(errors="backslashreplace"))
    return _kinds[key]


_kinds: dict[tuple[Path, int, int], bool] = {}

OLDEST_OF_QEMU = (6, 0)     # killpriv_v2
OLDEST = (1, 4)             # of the one in Rust; nobody has tried an older one


def _kind_of(program: Path, said: str) -> bool:
    """What ``virtiofsd --version`` says: "virtiofsd version 7.2.1 (Debian ...)" is QEMU's, "virtiofsd 1.10.1" isn't."""
    found = re.match(r"virtiofsd (version |backend |)v?(\d+)\.(\d+)", said)
    if found is None:
        raise ToolFailedError(f"{program} is no virtiofsd", output=said,
                              hint="PYKATA_VIRTIOFSD names one; apt-get install virtiofsd, or qemu-system-common")
    is_qemus, version = found[1] == "version ", (int(found[2]), int(found[3]))
    oldest = OLDEST_OF_QEMU if is_qemus else OLDEST
    if version < oldest:
        raise ToolTooOldError(
            f"{program} is virtiofsd {version[0]}.{version[1]}{' of QEMU' if is_qemus else ''}",
            hint=f"{oldest[0]}.{oldest[1]} or later is needed: apt-get install virtiofsd, PYKATA_VIRTIOFSD=..., or 9p",
        )
    return is_qemus


def _escaped(path: Path) -> str:
    return re.sub(r"([,\\])", r"\\\1", str(path))


def options(listener: int, root: Path, cache: str, *, is_qemus: bool, kills_privileges: bool = True) -> list[str]:
    """The daemon's options. Its sandbox and seccomp filter are on by default, and nothing here turns them off."""
    if is_qemus:
        return [
            f"--fd={listener}", "-f",
            # -o takes a comma for its own unless there is a backslash before it (fuse_opt.c).
            "-o", f"source={_escaped(root)}",
            "-o", f"cache={cache}",
            # What nobody else changes can wait in the guest until the file is closed, or written out.
            *(("-o", "writeback") if cache == "always" else ()),
            "-o", "sandbox=namespace",
            # Each share is a filesystem of its own in the guest, too: or files of two could look like one.
            "-o", "announce_submounts",
            "-o", "xattr",
            # Else the guest asks before each write whether the file has capabilities that it must take away. This
            # host's kernel does that, and takes setuid away, whenever the daemon writes: it has no capability here.
            "-o", "killpriv_v2" if kills_privileges else "no_killpriv_v2",
            "-o", "log_level=warn",
            "--rlimit-nofile=0",        # enter.py has set it
        ]  # fmt: skip
    return [
        f"--fd={listener}",
        f"--shared-dir={root}",
        f"--cache={'never' if cache == 'none' else cache}",
        *(("--writeback",) if cache == "always" else ()),
        "--sandbox=namespace",
        "--announce-submounts",
        "--xattr",
        *(("--killpriv-v2",) if kills_privileges else ()),
        "--log-level=warn",
        "--rlimit-nofile=0",
        # It hasn't the right to open files by handle, and would try it for each.
        "--inode-file-handles=never",
    ]  # fmt: skip
