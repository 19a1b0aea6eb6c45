"""Takes an image of an OCI layout into the depot as it is, each blob verified on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from attrs import evolve

from pykata.errors import ImageCorruptError
from pykata.images.config import Platform, go_architecture
from pykata.images.depot import Depot, Record, explained
from pykata.images.limits import DEFAULT_LIMITS
from pykata.images.manifest import MANIFESTS, Descriptor, parse_manifest
from pykata.images.name import Name
from pykata.images.oci import INDEX, choose, describe, open_blob, read_document
from pykata.images.pack import unless_left
from pykata.images.reference import Source, parse
from pykata.images.store import Store, has, in_place, open_store
from pykata.images.stream import read_chunks

LAYOUTS = (Source.OCI, Source.OCI_ARCHIVE, Source.PATH)


async def take_over(reference: str, name: Name, depot: Depot, architecture: str) -> Record | None:
    """Keep the image under ``name``; None if it isn't in an OCI layout."""
    return await unless_left(lambda poll: _take_over(reference, name, depot, architecture, poll))


def _take_over(
    reference: str, name: Name, depot: Depot, architecture: str, poll: Callable[[], None]
) -> Record | None:
    parsed = parse(reference)
    if parsed.source not in LAYOUTS:
        return None
    placed = in_place(parsed, DEFAULT_LIMITS, poll)
    store = open_store(placed.path)
    if parsed.source is Source.PATH and not has(store, INDEX):
        return None
    manifest = choose(store, placed, go_architecture(architecture))
    describe(store, manifest, architecture)         # verified before anything of it is kept
    config, layers = parse_manifest(read_document(store, manifest, "manifest"))
    for blob in (config, *layers, manifest):
        _copy(store, blob, depot, poll)
    kept = evolve(manifest, media_type=manifest.media_type or MANIFESTS[0], platform=Platform("", ""), tag="")
    record = Record(str(name), go_architecture(architecture), manifest.digest, kept)
    depot.save(record)
    return record


def _copy(store: Store, blob: Descriptor, depot: Depot, poll: Callable[[], None]) -> None:
    if depot.has(blob.digest, blob.size):
        return
    target = depot.blob(blob.digest)
    algorithm, _, want = blob.digest.partition(":")
    hashing = hashlib.new(algorithm)
    with explained(target):
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = target.parent / f"{os.urandom(8).hex()}.new"
        try:
            with open_blob(store, blob.digest) as source, fresh.open("xb") as out:
                for chunk in read_chunks(source, blob.size + 1):
                    poll()
                    hashing.update(chunk)
                    out.write(chunk)
            if hashing.hexdigest() != want:
                raise ImageCorruptError(f"the blob {blob.digest} isn't what its digest says", digest=blob.digest)
            fresh.rename(target)
        finally:
            fresh.unlink(missing_ok=True)
