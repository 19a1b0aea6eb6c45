"""Images in an OCI layout (image-spec, image-layout.md): an index, and blobs named by digest, in a folder or a tar."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import IO

from attrs import frozen

from pykata.errors import ImageCorruptError, ImageError, ImageNotFoundError, ImageReferenceError, ImageUnsupportedError
from pykata.images.config import (
    Platform,
    chain_id,
    check_layers,
    check_platform,
    go_architecture,
    parse_config,
    parse_diff_ids,
    parse_digest,
    parse_platform,
)
from pykata.images.document import MAX_DOCUMENT, Document, parse_document
from pykata.images.layer import Layer, write_merged
from pykata.images.limits import Limits
from pykata.images.reference import Reference
from pykata.images.store import Store, open_store, read_small
from pykata.spec import Image

MAX_NESTING = 4         # an index of indexes of ...
MAX_INDEXES = 50        # of one image
MAX_MANIFESTS = 1000    # in all of them
INDEX = "index.json"
TAG = "org.opencontainers.image.ref.name"

_INDEXES = {"application/vnd.oci.image.index.v1+json",
            "application/vnd.docker.distribution.manifest.list.v2+json"}
_MANIFESTS = {"application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"}
_LAYERS = {"application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"}
_SUFFIXES = ("+gzip", "+zstd", ".gzip", ".zstd")


@frozen
class Descriptor:
    """Points at a blob (image-spec, descriptor.md)."""

    media_type: str
    digest: str
    size: int
    platform: Platform
    tag: str = ""


def find_oci(reference: Reference, architecture: str, limits: Limits) -> Image:
    """Find an image in a layout and verify its metadata; its layers are verified when they are read."""
    return find_in_layout(open_store(reference.path), reference, architecture, limits)


def find_in_layout(store: Store, reference: Reference, architecture: str, limits: Limits) -> Image:
    descriptor = _choose(store, reference, go_architecture(architecture))
    manifest = _read_document(store, descriptor, "manifest")
    if manifest.get("config").value is None:
        raise ImageUnsupportedError("its manifest is of the old schema 1, or not of an image")
    described = _descriptor(manifest.get("config"))
    config = _read_document(store, described, "config")
    check_platform(parse_platform(config), architecture)
    layers = [_descriptor(layer) for layer in manifest.get("layers").list()]
    diff_ids = parse_diff_ids(config)
    check_layers(diff_ids, layers)
    stored = [_layer(store, layer, diff_id) for layer, diff_id in zip(layers, diff_ids, strict=True)]
    return Image(
        reference=reference.text, digest=chain_id(diff_ids), config=parse_config(config), architecture=architecture,
        write_tar=partial(write_merged, stored, limits),
    )


def _layer(store: Store, layer: Descriptor, diff_id: str) -> Layer:
    # The media type says whether it is a layer at all; how it is compressed, its first bytes know better: there are
    # plain layers called gzip, and both digests are verified anyway.
    base = layer.media_type
    for suffix in _SUFFIXES:
        base = base.removesuffix(suffix)
    if base not in _LAYERS:
        raise ImageUnsupportedError(f"its layer {layer.digest} is of the media type {layer.media_type[:200]!r}")
    return Layer(layer.digest, partial(_open_blob, store, layer.digest), layer.digest, layer.size, diff_id)


def _choose(store: Store, reference: Reference, wanted: str) -> Descriptor:
    """The manifest for a tag (or digest) and an architecture."""
    try:
        index = parse_document(read_small(store, INDEX), INDEX)
    except FileNotFoundError:
        raise ImageNotFoundError(f"{store.path} is not an OCI layout: it has no {INDEX}") from None
    except OSError as exc:
        raise ImageError(f"can't read {INDEX} of {store.path}: {exc}") from exc
    top = [_descriptor(one) for one in index.get("manifests").list()]
    if not top:
        raise ImageNotFoundError(f"{store.path} has no images")
    tags = sorted({one.tag for one in top if one.tag})
    named = [one for one in top if reference.tag in (one.tag, one.digest)] if reference.tag else top
    if not named:
        hint = f"it has {', '.join(tags) or 'no tags'}"
        raise ImageNotFoundError(f"{store.path} has no image {reference.tag!r}", hint=hint)
    if not reference.tag and len(tags) > 1:
        raise ImageReferenceError(f"{store.path} has more than one image", hint=f"add one of :{', :'.join(tags)}")
    manifests = _flattened(store, named)
    fitting = [(rank, number, one) for number, one in enumerate(manifests)
               if (rank := one.platform.rank(wanted)) is not None]
    if not fitting:
        found = sorted({str(one.platform) for one in manifests} - {"unknown/unknown"})
        raise ImageUnsupportedError(f"the image is not for linux/{wanted}", hint=f"it is for {', '.join(found)}")
    return min(fitting, key=lambda one: one[:2])[2]


def _flattened(store: Store, descriptors: list[Descriptor]) -> list[Descriptor]:
    """The manifests, with each index replaced by what it lists."""
    indexes = 0
    for _ in range(MAX_NESTING):
        found: list[Descriptor] = []
        for one in descriptors:
            if one.media_type in _INDEXES:
                indexes += 1
                if indexes > MAX_INDEXES:
                    raise ImageCorruptError(f"it has more than {MAX_INDEXES} indexes")
                listed = _read_document(store, one, "index").get("manifests").list()
                found += [_descriptor(nested) for nested in listed]
            elif one.media_type in _MANIFESTS or not one.media_type:
                found.append(one)
            if len(found) > MAX_MANIFESTS:
                raise ImageCorruptError(f"its indexes list more than {MAX_MANIFESTS} manifests")
        if not any(one.media_type in _INDEXES for one in found):
            return found
        descriptors = found
    raise ImageCorruptError(f"its indexes are nested more than {MAX_NESTING} deep")


def _descriptor(document: Document) -> Descriptor:
    return Descriptor(
        document.get("mediaType").text(), parse_digest(document.get("digest")), document.get("size").integer(),
        parse_platform(document.get("platform")), document.get("annotations").get(TAG).text(),
    )


def _read_document(store: Store, descriptor: Descriptor, what: str) -> Document:
    if descriptor.size > MAX_DOCUMENT:
        raise ImageCorruptError(f"its {what} has {descriptor.size} bytes, more than {MAX_DOCUMENT}",
                                digest=descriptor.digest)
    with _open_blob(store, descriptor.digest) as file:
        raw = file.read(descriptor.size + 1)
    algorithm, _, want = descriptor.digest.partition(":")
    if len(raw) != descriptor.size or hashlib.new(algorithm, raw).hexdigest() != want:
        raise ImageCorruptError(f"its {what} isn't what its digest {descriptor.digest} says", digest=descriptor.digest)
    return parse_document(raw, what)


def _open_blob(store: Store, digest: str) -> IO[bytes]:
    try:
        return store.open(f"blobs/{digest.replace(':', '/')}")
    except FileNotFoundError:
        raise ImageCorruptError(f"the blob {digest} is missing", digest=digest) from None
    except OSError as exc:
        raise ImageError(f"can't read the blob {digest}: {exc}") from exc
