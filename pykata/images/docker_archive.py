"""Images written by ``docker save``: a tar with a manifest of its own (moby, image/spec: "Combined Image JSON")."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from typing import IO

from pykata.errors import ImageCorruptError, ImageNotFoundError, ImageReferenceError
from pykata.images.config import (
    chain_id,
    check_layers,
    check_platform,
    parse_config,
    parse_diff_ids,
    parse_platform,
)
from pykata.images.document import Document, parse_document
from pykata.images.layer import Layer, write_merged
from pykata.images.limits import Limits
from pykata.images.reference import Reference
from pykata.images.store import Store, open_store, read_small
from pykata.spec import Image

MANIFEST = "manifest.json"
_CONFIG = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?", re.ASCII)


def find_docker_archive(reference: Reference, architecture: str, limits: Limits) -> Image:
    """Find an image in an archive and verify its metadata; its layers are verified when they are read."""
    return find_in_archive(open_store(reference.path), reference, architecture, limits)


def find_in_archive(store: Store, reference: Reference, architecture: str, limits: Limits) -> Image:
    try:
        manifests = parse_document(read_small(store, MANIFEST), MANIFEST)
    except FileNotFoundError:
        raise ImageNotFoundError(f"{store.path} is no archive of docker save: it has no {MANIFEST}",
                                 hint="a colon can't be in the path" if reference.tag else "") from None
    chosen = _choose(store, list(manifests.list()), reference.tag)
    config = _config(store, chosen.get("Config"))
    check_platform(parse_platform(config), architecture)
    names = chosen.get("Layers").texts()
    diff_ids = parse_diff_ids(config)
    check_layers(diff_ids, names)
    layers = [Layer(diff_id, partial(_open, store, name), diff_id=diff_id)
              for name, diff_id in zip(names, diff_ids, strict=True)]
    return Image(
        reference=reference.text, digest=chain_id(diff_ids), config=parse_config(config), architecture=architecture,
        write_tar=partial(write_merged, layers, limits),
    )


def _choose(store: Store, manifests: list[Document], tag: str) -> Document:
    tags = {one: manifest for manifest in manifests for one in manifest.get("RepoTags").texts()}
    hint = f"it has {', '.join(sorted(tags)) or 'no tags'}"
    if tag:
        # The end of a name will do where it is that of one image: "app:1" or "1" for "registry/library/app:1".
        named = [manifest for one, manifest in tags.items() if one == tag or one.endswith((f"/{tag}", f":{tag}"))]
        if not named:
            raise ImageNotFoundError(f"{store.path} has no image {tag!r}", hint=hint)
        if any(manifest is not named[0] for manifest in named):
            raise ImageReferenceError(f"{store.path} has more than one image {tag!r}", hint=hint)
        return named[0]
    if not manifests:
        raise ImageNotFoundError(f"{store.path} has no images")
    if len(manifests) > 1:
        raise ImageReferenceError(f"{store.path} has more than one image: add :TAG", hint=hint)
    return manifests[0]


def _config(store: Store, name: Document) -> Document:
    try:
        raw = read_small(store, name.text())
    except FileNotFoundError:
        raise ImageCorruptError(f"its config {name.text()[:200]!r} is missing") from None
    found = _CONFIG.fullmatch(name.text())
    if found and hashlib.sha256(raw).hexdigest() != found[1]:
        raise ImageCorruptError("its config isn't what its digest says", digest=f"sha256:{found[1]}")
    return parse_document(raw, "config")


def _open(store: Store, name: str) -> IO[bytes]:
    try:
        return store.open(name)
    except FileNotFoundError:
        raise ImageCorruptError(f"its layer {name[:200]!r} is missing") from None
