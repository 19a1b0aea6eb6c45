"""Images in an OCI layout (image-spec, image-layout.md): an index, and blobs named by digest, in a folder or a tar."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import IO

from attrs import frozen

from pykata.errors import ImageCorruptError, ImageError, ImageNotFoundError, ImageReferenceError
from pykata.images.config import (
    chain_id,
    check_layers,
    check_platform,
    go_architecture,
    parse_config,
    parse_diff_ids,
    parse_platform,
)
from pykata.images.document import MAX_DOCUMENT, Document, parse_document
from pykata.images.layer import Layer, write_merged
from pykata.images.limits import Limits
from pykata.images.manifest import (
    INDEXES,
    MANIFESTS,
    MAX_INDEXES,
    MAX_MANIFESTS,
    MAX_NESTING,
    Descriptor,
    best,
    parse_descriptor,
    parse_manifest,
)
from pykata.images.reference import Reference
from pykata.images.store import Store, open_store, read_small
from pykata.spec import Image, ImageConfig

INDEX = "index.json"


@frozen
class Described:
    """What the metadata of an image says: its config, and its layers with their diff_ids, lowest first."""

    config: ImageConfig
    layers: list[tuple[Descriptor, str]]

    @property
    def digest(self) -> str:
        """What identifies its filesystem."""
        return chain_id([diff_id for _, diff_id in self.layers])


def find_oci(reference: Reference, architecture: str, limits: Limits) -> Image:
    """Find an image in a layout and verify its metadata; its layers are verified when they are read."""
    return find_in_layout(open_store(reference.path), reference, architecture, limits)


def find_in_layout(store: Store, reference: Reference, architecture: str, limits: Limits) -> Image:
    described = describe(store, choose(store, reference, go_architecture(architecture)), architecture)
    stored = [Layer(layer.digest, partial(open_blob, store, layer.digest), layer.digest, layer.size, diff_id)
              for layer, diff_id in described.layers]
    return Image(
        reference=reference.text, digest=described.digest, config=described.config, architecture=architecture,
        write_tar=partial(write_merged, stored, limits),
    )


def describe(store: Store, descriptor: Descriptor, architecture: str) -> Described:
    """Read and verify the manifest that ``descriptor`` points at, and its config."""
    manifest = read_document(store, descriptor, "manifest")
    described, layers = parse_manifest(manifest)
    config = read_document(store, described, "config")
    check_platform(parse_platform(config), architecture)
    diff_ids = parse_diff_ids(config)
    check_layers(diff_ids, layers)
    return Described(parse_config(config), list(zip(layers, diff_ids, strict=True)))


def choose(store: Store, reference: Reference, wanted: str) -> Descriptor:
    """The manifest for a tag (or digest) and an architecture."""
    try:
        index = parse_document(read_small(store, INDEX), INDEX)
    except FileNotFoundError:
        raise ImageNotFoundError(f"{store.path} is not an OCI layout: it has no {INDEX}") from None
    except OSError as exc:
        raise ImageError(f"can't read {INDEX} of {store.path}: {exc}") from exc
    top = [parse_descriptor(one) for one in index.get("manifests").list()]
    if not top:
        raise ImageNotFoundError(f"{store.path} has no images")
    tags = sorted({one.tag for one in top if one.tag})
    named = [one for one in top if reference.tag in (one.tag, one.digest)] if reference.tag else top
    if not named:
        hint = f"it has {', '.join(tags) or 'no tags'}"
        raise ImageNotFoundError(f"{store.path} has no image {reference.tag!r}", hint=hint)
    if not reference.tag and len(tags) > 1:
        raise ImageReferenceError(f"{store.path} has more than one image", hint=f"add one of :{', :'.join(tags)}")
    return best(_flattened(store, named), wanted)


def _flattened(store: Store, descriptors: list[Descriptor]) -> list[Descriptor]:
    """The manifests, with each index replaced by what it lists."""
    indexes = 0
    for _ in range(MAX_NESTING):
        found: list[Descriptor] = []
        for one in descriptors:
            if one.media_type in INDEXES:
                indexes += 1
                if indexes > MAX_INDEXES:
                    raise ImageCorruptError(f"it has more than {MAX_INDEXES} indexes")
                listed = read_document(store, one, "index").get("manifests").list()
                found += [parse_descriptor(nested) for nested in listed]
            elif one.media_type in MANIFESTS or not one.media_type:
                found.append(one)
            if len(found) > MAX_MANIFESTS:
                raise ImageCorruptError(f"its indexes list more than {MAX_MANIFESTS} manifests")
        if not any(one.media_type in INDEXES for one in found):
            return found
        descriptors = found
    raise ImageCorruptError(f"its indexes are nested more than {MAX_NESTING} deep")


def read_document(store: Store, descriptor: Descriptor, what: str) -> Document:
    if descriptor.size > MAX_DOCUMENT:
        raise ImageCorruptError(f"its {what} has {descriptor.size} bytes, more than {MAX_DOCUMENT}",
                                digest=descriptor.digest)
    with open_blob(store, descriptor.digest) as file:
        raw = file.read(descriptor.size + 1)
    algorithm, _, want = descriptor.digest.partition(":")
    if len(raw) != descriptor.size or hashlib.new(algorithm, raw).hexdigest() != want:
        raise ImageCorruptError(f"its {what} isn't what its digest {descriptor.digest} says", digest=descriptor.digest)
    return parse_document(raw, what)


def open_blob(store: Store, digest: str) -> IO[bytes]:
    try:
        return store.open(f"blobs/{digest.replace(':', '/')}")
    except FileNotFoundError:
        raise ImageCorruptError(f"the blob {digest} is missing", digest=digest) from None
    except OSError as exc:
        raise ImageError(f"can't read the blob {digest}: {exc}") from exc
