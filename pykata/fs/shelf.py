"""Root filesystems whose files are shared rather than copied onto a disk.

What virtio-fs and 9p make of a directory is not what an image says: who isn't root can't give files other owners, a
setuid program would lie about on the host, and a device node can't be made at all. So the guest gets the tree of an
image (names, owners, modes, attributes, devices) as a small disk, and only the content of files is shared: overlayfs
puts them together. On the host the content are plain files with numbers for names, or, of an image that is a directory
(``dir:``), the files that are there: nothing is copied then.

A machine gets one shared directory when it starts, the shelf, which is empty. A directory is put on it as long as an
image is used, and is a read-only mount in a namespace that only the server of the files sees: so a guest that breaks
out of its kernel's hands reads the images that it runs, and no others.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import ClassVar

import anyio.to_thread

from pykata.errors import HostError, NotPermittedError
from pykata.fs.apart import Apart, kept_apart
from pykata.fs.base import SharedFs
from pykata.fs.block import TAG, attachment, folder, ready, stem
from pykata.host import short_name
from pykata.spec import VOLUMES, Attachment, Disk, Image

SHELF = "images"
_SOCKET = "shelf.sock"
_PATIENCE = 10.0        # seconds; it is a process of ours, and only mounts


class SharedRoot(SharedFs):
    """What virtio-fs and 9p have in common as root filesystems."""

    shared: ClassVar[bool] = True
    in_place: ClassVar[bool] = True
    """Whether it can read whatever its user can."""

    @asynccontextmanager
    async def rootfs(self, image: Image, run_dir: Path) -> AsyncIterator[Attachment]:
        """Make ``image`` attachable; it is taken apart if that wasn't done before. A disk is attached as it is.

        Raises :class:`~pykata.errors.ImageError` if it is damaged, and :class:`~pykata.errors.HostError`.
        """
        if image.disk is not None:
            with ready(image) as attached:
                yield attached
            return
        async with self._kept(image) as parts, on_shelf(run_dir, parts.content) as name:
            yield attachment(Disk(TAG, parts.tree), "squashfs") + Attachment(content=(f"{VOLUMES}/{SHELF}/{name}",))


    @asynccontextmanager
    async def made(self, image: Image) -> AsyncIterator[None]:
        """Take ``image`` apart, if that wasn't done before. Raises as :meth:`rootfs` does."""
        if image.disk is not None:
            with ready(image):
                yield
            return
        async with self._kept(image):
            yield

    def _kept(self, image: Image) -> AbstractAsyncContextManager[Apart]:
        return kept_apart(image, folder(), stem(image.digest), in_place=self.in_place)


@contextmanager
def shelf_socket(run_dir: Path) -> Iterator[socket.socket]:
    """The listening socket of a shelf, which whoever knows the run directory can reach."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with short_name(run_dir) as directory:
            listener.bind(f"{directory}/{_SOCKET}")
        listener.listen(128)
    except OSError as exc:
        listener.close()
        raise HostError(f"can't make a socket for images: {exc}") from exc
    with listener:
        yield listener


@asynccontextmanager
async def on_shelf(run_dir: Path, path: Path) -> AsyncIterator[str]:
    """Put a directory on the shelf of the machine with this run directory; yields its name there. Raises HostError."""
    with _connected(run_dir) as connection:
        said = await anyio.to_thread.run_sync(_asked, connection, os.fsencode(path))
        if not said.startswith("+"):
            why = f"can't share {path}: {said[1:]}"
            if "not permitted" in said or "denied" in said:
                raise NotPermittedError(why)
            raise HostError(why, hint="other file systems that are mounted below it can't be shared: fs='block' copies")
        yield said[1:]


def open_shelf(run_dir: Path) -> int:
    """A descriptor of the shelf itself, for whoever serves it. Blocks until it is there. Raises HostError."""
    with _connected(run_dir) as connection:
        try:
            connection.send(b"/")
            _, descriptors, _, _ = socket.recv_fds(connection, 16, 1)
        except OSError as exc:
            raise HostError(f"can't share images: {exc}") from exc
        if not descriptors:
            raise HostError("can't share images: who shares them has ended")
        os.set_inheritable(descriptors[0], False)
        return descriptors[0]


@contextmanager
def _connected(run_dir: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_PATIENCE)
        try:
            with short_name(run_dir) as directory:
                connection.connect(f"{directory}/{_SOCKET}")
        except OSError as exc:
            raise HostError(f"can't reach who shares images: {exc}") from exc
        yield connection


def _asked(connection: socket.socket, path: bytes) -> str:
    try:
        connection.send(path)
        return connection.recv(4096).decode(errors="backslashreplace") or "-it has ended"
    except OSError as exc:
        return f"-{exc}"
