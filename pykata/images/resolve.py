"""From a reference to an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import IO

import anyio.to_thread
from attrs import evolve

from pykata.errors import ImageError, ImageReferenceError
from pykata.images.builtin import Builtin, find_builtin
from pykata.images.disk import find_disk
from pykata.images.docker_archive import MANIFEST, find_docker_archive, find_in_archive
from pykata.images.limits import DEFAULT_LIMITS, Limits
from pykata.images.oci import INDEX, find_in_layout, find_oci
from pykata.images.pulled import DEFAULT_PULLING, Pulling, find_pulled
from pykata.images.reference import Reference, Source, parse
from pykata.images.store import has, in_place, open_store
from pykata.images.tarball import find_tarball
from pykata.spec import Image


async def resolve(
    reference: str, *, architecture: str, builtin: Builtin | None = None, limits: Limits = DEFAULT_LIMITS,
    how: Pulling = DEFAULT_PULLING,
) -> Image:
    """Find the image that ``reference`` names, for a guest of this ``architecture`` (``x86_64``, ``aarch64``).

    ::

        image = await resolve("oci:./images/debian-python", architecture="x86_64")

    Only metadata is read and verified; the layers are when ``write_tar`` reads them. ``builtin`` are the images that
    ``builtin:NAME`` can name, with their disks and OCI configs. ``how`` is about images in registries. Raises
    :class:`~pykata.errors.ImageError`.
    """
    parsed = parse(reference)
    if parsed.source is Source.REGISTRY:
        with _about(parsed):
            image = await find_pulled(parsed, architecture, limits, how)
        return _explained(parsed, image)
    stop = Event()

    def poll() -> None:
        if stop.is_set():
            raise _AbandonedError

    find = partial(_find, parsed, architecture, builtin or {}, limits, poll)
    try:
        # Left behind when this is cancelled: it only reads, and ends as soon as it looks.
        return await anyio.to_thread.run_sync(find, abandon_on_cancel=True)
    finally:
        stop.set()


class _AbandonedError(Exception):
    """Nobody waits for this image any more."""


def _find(
    reference: Reference, architecture: str, builtin: Builtin, limits: Limits, poll: Callable[[], None]
) -> Image:
    with _about(reference):
        image = _look(reference, architecture, builtin, limits, poll)
    return _explained(reference, image)


def _explained(reference: Reference, image: Image) -> Image:
    if image.write_tar is None:
        return image
    apart = image.write_apart or partial(_apart, image.write_tar)
    return evolve(
        image, write_tar=partial(_write_tar, reference, image.write_tar),
        write_apart=partial(_write_apart, reference, apart),
    )  # fmt: skip


def _apart(write_tar: Callable[[IO[bytes]], None], dest: IO[bytes], content: Path | None) -> None:
    from pykata.images.apart import write_apart  # few need it

    write_apart(write_tar, dest, content)


def _write_apart(
    reference: Reference, write_apart: Callable[[IO[bytes], Path | None], None], dest: IO[bytes], content: Path | None
) -> None:
    with _about(reference):
        write_apart(dest, content)


def _write_tar(reference: Reference, write_tar: Callable[[IO[bytes]], None], dest: IO[bytes]) -> None:
    with _about(reference):
        write_tar(dest)


@contextmanager
def _about(reference: Reference) -> Iterator[None]:
    """Every error of an image says which one it is about."""
    try:
        yield
    except ImageError as exc:
        exc.reference = exc.reference or reference.text
        raise


def _look(
    reference: Reference, architecture: str, builtin: Builtin, limits: Limits, poll: Callable[[], None]
) -> Image:
    if reference.source in (Source.OCI, Source.OCI_ARCHIVE, Source.DOCKER_ARCHIVE, Source.PATH):
        reference = in_place(reference, limits, poll)
    match reference.source:
        case Source.OCI | Source.OCI_ARCHIVE:
            return find_oci(reference, architecture, limits)
        case Source.DOCKER_ARCHIVE:
            return find_docker_archive(reference, architecture, limits)
        case Source.DIRECTORY:
            from pykata.images.directory import find_directory  # it brings all that reads layers

            return find_directory(reference, architecture, limits, poll)
        case Source.TARBALL:
            return find_tarball(reference, architecture, limits)
        case Source.BUILTIN:
            return find_builtin(reference, architecture, builtin)
        case Source.PATH:
            return _look_at_path(reference, architecture, limits)
        case Source.DISK:
            return find_disk(reference, architecture, "raw")
        case Source.QCOW2:
            return find_disk(reference, architecture, "qcow2")
        case Source.DOCKER_DAEMON:
            from pykata.images.daemon import find_in_daemon

            return find_in_daemon(reference, architecture, limits, poll)
        case Source.REGISTRY:
            raise AssertionError("registries are asked in the event loop")


def _look_at_path(reference: Reference, architecture: str, limits: Limits) -> Image:
    store = open_store(reference.path)
    if has(store, INDEX):
        return find_in_layout(store, reference, architecture, limits)
    if has(store, MANIFEST):
        return find_in_archive(store, reference, architecture, limits)
    raise ImageReferenceError(f"{reference.path} is no OCI layout and no archive of docker save",
                              hint=f"is it a root filesystem? Then say dir:{reference.path} or tar:{reference.path}")
