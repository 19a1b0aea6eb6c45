"""Images in two parts, made once and kept: their trees as squashfs, and the content of their files in a directory."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import IO

import anyio.to_thread
from attrs import frozen

from pykata import host
from pykata.errors import ConfigError
from pykata.fs.kept import make_kept, open_kept
from pykata.fs.squashfs import FORMAT as SQUASHFS_FORMAT
from pykata.fs.squashfs import convert
from pykata.spec import Image

FORMAT = 1
"""Of what is written apart: change it when the same image gives other files."""


@frozen
class Apart:
    """The two parts, which stay as long as they are used."""

    tree: Path
    content: Path


@asynccontextmanager
async def kept_apart(image: Image, folder: Path, stem: str, *, in_place: bool) -> AsyncIterator[Apart]:
    """An image that isn't a disk, in two parts: in ``folder``, by names that begin with ``stem``.

    ``in_place`` leaves the content of an image that is a directory where it is. Raises ImageError, HostError.
    """
    if image.write_apart is None:
        raise ConfigError(f"{image.reference} can't be shared as files", hint='fs="block" can have it')
    directory = image.directory if in_place else None
    path = folder / f"{stem}-{'apart' if directory is None else 'tree'}{FORMAT}-{SQUASHFS_FORMAT}.squashfs"
    make = partial(_make_both, image) if directory is None else partial(_make_tree, image)
    while (descriptor := open_kept(path)) is None:
        await make_kept(path, make)
    try:
        yield Apart(path, directory or path.with_suffix(host.CONTENT))
    finally:
        os.close(descriptor)


async def _make_tree(image: Image, part: Path) -> None:
    await convert(_apart(image, None), part, compression="lz4")


async def _make_both(image: Image, part: Path) -> None:
    content = part.with_suffix(host.CONTENT)
    await anyio.to_thread.run_sync(_begin, content)
    try:
        await convert(_apart(image, content), part, compression="lz4")
        await anyio.to_thread.run_sync(_finish, content)
    except BaseException:
        await host.finish(anyio.to_thread.run_sync(partial(shutil.rmtree, content, ignore_errors=True)))
        raise


def _apart(image: Image, content: Path | None) -> Callable[[IO[bytes]], None]:
    def write(dest: IO[bytes]) -> None:
        assert image.write_apart is not None
        image.write_apart(dest, content)

    return write


def _begin(content: Path) -> None:
    shutil.rmtree(content, ignore_errors=True)      # of one who was killed
    content.mkdir()
    content.chmod(0o755)


def _finish(content: Path) -> None:
    """Note how much there is, and write it out: the tree, which comes after it, says that it is whole."""
    size = sum(file.stat().st_blocks * 512 for file in content.glob("*/*"))
    (content / host.CONTENT_SIZE).write_text(str(size))
    descriptor = os.open(content, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) < 0:
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(descriptor)
