"""Images in the depot, and the way there from a registry.

What reads a registry is imported when one is asked: an image that is here needs neither HTTP nor TLS.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, TYPE_CHECKING, Any, cast

import anyio.to_thread
from attrs import frozen

from pykata.errors import ImageCorruptError, ImageError, ImageNotFoundError, ImageUnsupportedError
from pykata.images.arriving import Arriving
from pykata.images.config import go_architecture
from pykata.images.depot import Depot, Record, find_depot, take
from pykata.images.layer import Layer, write_merged
from pykata.images.limits import Limits
from pykata.images.name import Name
from pykata.images.oci import Described
from pykata.images.reference import Reference
from pykata.spec import Image, Progress, PullEvent, PullPolicy, Registries

if TYPE_CHECKING:
    from pykata.images.registry.download import Source

log = logging.getLogger(__name__)


@frozen
class Pulling:
    """How images are pulled. ``progress`` is called in the event loop of who asks for one."""

    pull: PullPolicy = "missing"
    registries: Registries | None = None
    progress: Progress | None = None


DEFAULT_PULLING = Pulling()


async def find_pulled(reference: Reference, architecture: str, limits: Limits, how: Pulling) -> Image:
    """Find an image by its name: in the depot, or in its registry if ``how.pull`` wants that.

    Only its metadata is read; its layers come when ``write_tar`` reads them.
    """
    assert reference.name is not None
    depot = find_depot()
    record = await anyio.to_thread.run_sync(_known, depot, reference.name, architecture)
    fixed = bool(reference.name.digest)
    if record is None and how.pull == "never":
        raise ImageNotFoundError(f"{reference.name} isn't here, and pull=\"never\"", hint='pull it, or pull="missing"')
    source = None
    if record is None or (how.pull == "always" and not fixed):
        from pykata.images.registry.resolve import ask

        record, source = await ask(reference.name, architecture, depot, record, how.registries)
    described = await anyio.to_thread.run_sync(depot.describe, record)
    fetch = _Fetch(depot, record, described, source, how, _reporter(reference, how.progress))
    return Image(
        reference=reference.text, digest=described.digest, config=described.config, architecture=architecture,
        write_tar=partial(_write, fetch, limits),
    )


def _known(depot: Depot, name: Name, architecture: str) -> Record | None:
    """The record of a name, if what it points at is here and right."""
    record = depot.find(str(name), go_architecture(architecture))
    if record is not None:
        with suppress(ImageError):
            depot.describe(record)
            depot.use(record)
            return record
    return None


@frozen
class _Fetch:
    depot: Depot
    record: Record
    described: Described
    source: Source | None
    how: Pulling
    report: Callable[[str, str, int, int], None]


def _write(fetch: _Fetch, limits: Limits, dest: IO[bytes]) -> None:
    watched = _Watched(dest)
    try:
        if not _merge(fetch, limits, watched):
            # A layer that was here was wrong, as after a crash of the machine. It is gone now; its registry has it.
            _merge(fetch, limits, watched, again=True)
    except (ImageCorruptError, ImageUnsupportedError):
        fetch.depot.remove(fetch.record)        # nothing of what is refused stays
        raise
    fetch.report("", "converted", 0, 0)


def _merge(fetch: _Fetch, limits: Limits, dest: _Watched, *, again: bool = False) -> bool:
    """Write the merged layers; False if one that was here before turned out to be wrong, and can be had again."""
    here = {d.digest for d, _ in fetch.described.layers if fetch.depot.blob(d.digest).exists()}
    try:
        with _layers(fetch) as layers:
            write_merged(layers, limits, cast(IO[bytes], dest))
    except ImageCorruptError as exc:
        if exc.digest not in here or fetch.how.pull == "never":
            raise
        fetch.depot.blob(exc.digest).unlink(missing_ok=True)
        if again or dest.written:
            raise
        return False
    return True


class _Watched:
    """A destination that remembers whether anything was written."""

    def __init__(self, dest: IO[bytes]) -> None:
        self._dest = dest
        self.flush = dest.flush
        self.written = False

    def write(self, data: bytes) -> int:
        self.written = True
        return self._dest.write(data)


@contextmanager
def _layers(fetch: _Fetch) -> Iterator[list[Layer]]:
    """The layers, to be read while those that are missing are downloaded."""
    blobs: dict[str, Arriving] = {}
    for descriptor, _ in fetch.described.layers:
        blobs.setdefault(descriptor.digest, Arriving(descriptor.digest, descriptor.size))
    try:
        missing = [blob for blob in blobs.values() if not _take(blob, fetch)]
        layers = [Layer(d.digest, blobs[d.digest].open, d.digest, d.size, diff_id)
                  for d, diff_id in fetch.described.layers]
        if not missing:
            yield layers
            return
        if fetch.how.pull == "never":
            raise ImageNotFoundError(f"{missing[0].digest} of {fetch.record.name} isn't here, and pull=\"never\"",
                                     hint='pull it again, or pull="missing"')
        with _downloading(fetch, missing):
            yield layers
    finally:
        for blob in blobs.values():
            blob.close()


def _take(blob: Arriving, fetch: _Fetch) -> bool:
    if not take(blob, fetch.depot):
        return False
    fetch.report(blob.digest, "exists", blob.size, blob.size)
    return True


@contextmanager
def _downloading(fetch: _Fetch, blobs: list[Arriving]) -> Iterator[None]:
    """Download in an event loop of our own, in a thread that ends with the block: this one is busy reading."""
    from anyio.from_thread import start_blocking_portal

    from pykata.images.registry.download import download_all
    from pykata.images.registry.resolve import source_of

    with start_blocking_portal("asyncio") as portal:
        source = fetch.source or source_of(fetch.record, fetch.how.registries)
        download = portal.start_task_soon(download_all, source, fetch.depot, blobs, fetch.report)
        try:
            yield
        finally:
            download.cancel()


def _reporter(reference: Reference, progress: Progress | None) -> Callable[[str, str, int, int], None]:
    """What passes the steps of a pull on to the event loop that asked for it."""
    if progress is None:
        return lambda digest, status, done, total: None
    loop, shown = asyncio.get_running_loop(), dict[str, int]()

    def report(digest: str, status: Any, done: int, total: int) -> None:
        # A hundred steps of each layer are enough for any bar.
        if status == "downloading" and done < total and done - shown.get(digest, -total) < total // 100:
            return
        shown[digest] = done
        with suppress(RuntimeError):            # its loop is closed: nobody listens
            loop.call_soon_threadsafe(tell, PullEvent(reference.text, digest, status, done, total))

    def tell(event: PullEvent) -> None:
        try:
            progress(event)
        except Exception:
            log.exception("the progress callback failed")

    return report
