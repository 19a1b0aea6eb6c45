"""A registry in the test itself, whose every answer can be a lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import define, field

from tests.http_server import Answer, Request
from tests.images_fixtures import LAYER_TYPE, compress, config_of, digest_of

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"

Override = Callable[[Request], Answer | None]


@define
class Offer:
    """What the registry has, by the last part of a path: tags, digests. ``override`` is asked first."""

    manifests: dict[str, tuple[bytes, str]] = field(factory=dict)
    blobs: dict[str, bytes] = field(factory=dict)
    override: Override = lambda request: None

    def __call__(self, request: Request) -> Answer:
        if (answer := self.override(request)) is not None:
            return answer
        kind, _, pointer = request.path.rpartition("/")
        if kind.endswith("/manifests") and pointer in self.manifests:
            raw, media_type = self.manifests[pointer]
            return Answer(raw, headers={"Content-Type": media_type})
        if kind.endswith("/blobs") and pointer in self.blobs:
            return Answer(self.blobs[pointer])
        return Answer(b"{}", 200 if request.path == "/v2/" else 404)

    def blob(self, data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        """Add a blob; returns its descriptor."""
        self.blobs[digest_of(data)] = data
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}

    def document(self, value: Any, media_type: str, *tags: str, **more: Any) -> dict[str, Any]:
        """Add a manifest or an index, with tags; returns its descriptor."""
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        for pointer in (digest_of(raw), *tags):
            self.manifests[pointer] = raw, media_type
        return {"mediaType": media_type, "digest": digest_of(raw), "size": len(raw), **more}

    def manifest(self, *tars: bytes, compression: str = "plain", **more: Any) -> dict[str, Any]:
        """The manifest of an image with these layers, not added yet."""
        suffix = "" if compression == "plain" else f"+{compression}"
        config = json.dumps(config_of(tars)).encode()
        return {
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": self.blob(config, CONFIG_TYPE),
            "layers": [self.blob(compress(tar, compression), LAYER_TYPE + suffix) for tar in tars], **more,
        }  # fmt: skip

    def image(self, *tars: bytes, tag: str = "1", **more: Any) -> dict[str, Any]:
        """Add an image; returns its descriptor."""
        return self.document(self.manifest(*tars, **more), MANIFEST_TYPE, tag)


def offer(*tars: bytes, **more: Any) -> Offer:
    """A registry with one image, as ``app:1``."""
    made = Offer()
    made.image(*tars, **more)
    return made


def on(path: str, answer: Answer) -> Override:
    """An answer to the requests whose path has ``path`` in it."""
    return lambda request: answer if path in request.path else None


def stored(places: Path) -> list[Path]:
    """All files of the cache."""
    return sorted(path for path in (places / "cache").rglob("*") if path.is_file())


def bearer(realm: str, **more: str) -> Mapping[str, str]:
    """The header of an answer that asks for a token."""
    parts = {"realm": realm, "service": "test", **more}
    return {"WWW-Authenticate": "Bearer " + ",".join(f'{name}="{value}"' for name, value in parts.items())}
