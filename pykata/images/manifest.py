"""Manifests and indexes, of OCI and of Docker: what they point at, and which of several fits a guest.

image-spec: descriptor.md, manifest.md, image-index.md; distribution: "Image Manifest Version 2, Schema 2".
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from pykata.errors import ImageCorruptError, ImageUnsupportedError
from pykata.images.config import Platform, parse_digest, parse_platform
from pykata.images.document import Document

MAX_NESTING = 4         # an index of indexes of ...
MAX_INDEXES = 50        # of one image
MAX_MANIFESTS = 1000    # in all of them
TAG = "org.opencontainers.image.ref.name"

INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"
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


def parse_descriptor(document: Document) -> Descriptor:
    return Descriptor(
        document.get("mediaType").text(), parse_digest(document.get("digest")), document.get("size").integer(),
        parse_platform(document.get("platform")), document.get("annotations").get(TAG).text(),
    )


def is_index(document: Document, media_type: str) -> bool:
    """Whether it is an index rather than a manifest. What could be taken for both is refused (CVE-2021-41190)."""
    stated = document.get("mediaType").text()
    if stated and media_type and stated != media_type:
        raise ImageCorruptError(f"{document.where} says that it is {stated[:200]!r}, not {media_type[:200]!r}")
    if document.get("manifests").value is not None and (
        document.get("layers").value is not None or document.get("config").value is not None
    ):
        raise ImageCorruptError(f"{document.where} is both an index and a manifest")
    known = stated or media_type
    if known in INDEXES:
        return True
    if known in MANIFESTS:
        return False
    if known.startswith(_SCHEMA_1) or document.get("schemaVersion").value == 1:
        raise ImageUnsupportedError("its manifest is of the old schema 1", hint="push it again with a newer Docker")
    raise ImageUnsupportedError(f"its manifest is of the media type {known[:200]!r}", hint="is it an image at all?")


def parse_manifest(manifest: Document) -> tuple[Descriptor, list[Descriptor]]:
    """The descriptors of the config and of the layers, lowest first."""
    if manifest.get("config").value is None:
        raise ImageUnsupportedError("its manifest is of the old schema 1, or not of an image")
    layers = [parse_descriptor(layer) for layer in manifest.get("layers").list()]
    for layer in layers:
        _check_layer(layer)
    return parse_descriptor(manifest.get("config")), layers


def _check_layer(layer: Descriptor) -> None:
    # The media type says whether it is a layer at all; how it is compressed, its first bytes know better: there are
    # plain layers called gzip, and both digests are verified anyway.
    base = layer.media_type
    for suffix in _SUFFIXES:
        base = base.removesuffix(suffix)
    if base not in _LAYERS:
        raise ImageUnsupportedError(f"its layer {layer.digest} is of the media type {layer.media_type[:200]!r}")


def best(manifests: Sequence[Descriptor], wanted: str) -> Descriptor:
    """The manifest that fits the architecture ``wanted`` (Go's name for it) best, the first of several."""
    fitting = [(rank, number, one) for number, one in enumerate(manifests)
               if (rank := one.platform.rank(wanted)) is not None]
    if not fitting:
        found = sorted({str(one.platform) for one in manifests} - {"unknown/unknown", ""})
        hint = f"it is for {', '.join(found)[:1000]}" if found else ""
        raise ImageUnsupportedError(f"the image is not for linux/{wanted}", hint=hint)
    return min(fitting, key=lambda one: one[:2])[2]
