"""Templates with a container in them: of the image that sandboxes of a kind begin with.

A sandbox doesn't say when it is entered which image will run in it, but mostly it begins as those before it did. So
each kind has a record of that, and when two in a row began with the same image, the next makes a template that has a
container of it, in which a process waits for its command. It is a template of its own beside the bare one, and whoever
runs something else in it has lost nothing but what the container takes of memory.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import anyio.to_thread
from attrs import asdict, evolve, frozen

from pykata import saved_disks, template_cache
from pykata.errors import PykataError, SavedDamagedError
from pykata.host import finish
from pykata.options import Options
from pykata.origin import Origin
from pykata.spec import Image

log = logging.getLogger(__name__)

IN_A_ROW = 2
"""How many sandboxes begin with an image before the next gets it prepared."""

SHARE = 4
"""The image of a template may take this part of what all templates may."""

RETRY = 60.0
"""Seconds after which this process tries again to make a template, where that has failed."""

_not_before: dict[Path, float] = {}


@frozen
class Record:
    """The image that the last sandboxes of a kind began with, and how many of them."""

    reference: str
    digest: str
    disk: int                   # bytes of the container's writable layer
    times: int = 1
    too_large: bool = False     # to be copied into a template

    def names(self, image: Image, disk: int) -> bool:
        """Whether it is the same."""
        return (self.reference, self.digest, self.disk) == (image.reference, image.digest, disk)


def expected(folder: Path, options: Options) -> Record | None:
    """With what a sandbox will probably begin. ``folder`` has the bare template of its kind."""
    if options.bare or options.hypervisor.features.disk_slots < 2:      # else nothing would be left for another image
        return None
    record = _record_of(folder)
    if record is None or record.too_large or record.times < IN_A_ROW or record.disk != options.disk:
        return None
    return record


def _record_of(folder: Path) -> Record | None:
    try:
        return Record(**json.loads(_file(folder).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def note(folder: Path, options: Options, image: Image) -> None:
    """A sandbox of this kind has begun with this image."""
    record = _record_of(folder)
    if record is None or not record.names(image, options.disk):
        record = Record(image.reference, image.digest, options.disk)
    elif record.times >= IN_A_ROW:
        return
    else:
        record = evolve(record, times=record.times + 1)
    _write(folder, record)


def _write(folder: Path, record: Record) -> None:
    fresh = _file(folder).with_suffix(f".{os.urandom(4).hex()}.new")       # several sandboxes may begin at a time
    with suppress(OSError):         # then the next begins as slowly as this one
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                json.dump(asdict(record), file)
            fresh.rename(_file(folder))
        finally:
            fresh.unlink(missing_ok=True)


def _file(folder: Path) -> Path:
    return folder.with_suffix(".image")


def folder_of(folder: Path, record: Record) -> Path:
    """Where the template with a container is, or would be."""
    return template_cache.folder_of({"bare": folder.name, "image": record.digest, "reference": record.reference,
                                     "disk": str(record.disk)})


async def prepare(kind: Path, options: Options, record: Record, bare: Origin) -> None:
    """Make the template with a container, if nobody does so already. Where that can't be done there is none.

    ``kind`` has the bare one.
    """
    folder = folder_of(kind, record)
    if time.monotonic() < _not_before.get(folder, 0.0):
        return
    try:
        with template_cache.turn_to_make(folder) as ours:
            if ours:
                await _make(kind, options, record, bare)
    except SavedDamagedError as damaged:
        template_cache.drop(kind, bare, damaged)
    except (PykataError, OSError) as error:
        _not_before[folder] = time.monotonic() + RETRY
        log.warning("no template with %s was made: %s", record.reference, error)


async def _make(kind: Path, options: Options, record: Record, bare: Origin) -> None:
    from pykata.templates import bare_with

    async with bare_with(options, bare, record.reference) as origin:
        if sum(map(saved_disks.size_of, origin.vm.slots.values())) > template_cache.limit() // SHARE:
            _write(kind, evolve(record, too_large=True))
            return
        await finish(anyio.to_thread.run_sync(template_cache.keep, folder_of(kind, record), origin))
