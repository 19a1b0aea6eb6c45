"""Whatever a registry sends as a manifest, an index, a config, a challenge: an image, or one of our errors."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pykata.errors import ImageError
from pykata.images.config import check_layers, parse_config, parse_diff_ids, parse_digest, parse_platform
from pykata.images.document import parse_document
from pykata.images.manifest import best, is_index, parse_descriptor, parse_manifest
from pykata.images.registry.auth import parse_challenges
from tests.images_fixtures import config_of, digest_of
from tests.registry_fixtures import INDEX_TYPE, MANIFEST_TYPE, Offer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
    | st.sampled_from([digest_of(b""), "sha256:00", MANIFEST_TYPE, INDEX_TYPE, "linux", "amd64"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([
        "mediaType", "digest", "size", "config", "layers", "manifests", "platform", "os", "architecture", "variant",
        "annotations", "schemaVersion", "rootfs", "diff_ids", "type", "Env", "Cmd", "Labels", "User", "urls",
    ]), inner, max_size=6), max_leaves=25,
)  # fmt: skip
VALID = Offer().manifest(b"one", b"two")


def read(raw: bytes, media_type: str) -> None:
    """All that is read of a manifest or an index before anything is asked for."""
    document = parse_document(raw, "manifest")
    if is_index(document, media_type):
        best([parse_descriptor(listed) for listed in document.get("manifests").list()], "amd64")
        return
    config, layers = parse_manifest(document)
    assert parse_digest(document.get("config").get("digest")) == config.digest
    assert all(layer.size >= 0 for layer in layers)


@settings(max_examples=300, deadline=None)
@given(JSON, st.sampled_from([MANIFEST_TYPE, INDEX_TYPE, "", "text/plain"]))
def test_any_document(value: Any, media_type: str) -> None:
    with suppress(ImageError):
        read(json.dumps(value).encode(), media_type)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([MANIFEST_TYPE, INDEX_TYPE]))
def test_any_bytes(raw: bytes, media_type: str) -> None:
    with suppress(ImageError):
        read(raw, media_type)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_manifest_with_one_thing_changed(data: st.DataObject) -> None:
    manifest = copy.deepcopy(VALID)
    where: Any = data.draw(st.sampled_from([manifest, manifest["config"], manifest["layers"][0]]))
    where[data.draw(st.sampled_from([*where, "manifests"]))] = data.draw(JSON)
    with suppress(ImageError):
        read(json.dumps(manifest).encode(), MANIFEST_TYPE)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_config(value: Any) -> None:
    base = config_of([b"x"])
    for document in (value, base | {"config": value}, base | {"rootfs": value}):
        with suppress(ImageError):
            parsed = parse_document(json.dumps(document).encode(), "config")
            parse_platform(parsed)
            check_layers(parse_diff_ids(parsed), [1])
            assert parse_config(parsed).workdir.startswith("/")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.lists(st.sampled_from(
    ["Bearer ", "Basic ", "realm", "=", '"', ",", " ", "\\", "https://a/b", "x"]), max_size=20).map("".join))
def test_any_challenge(header: str) -> None:
    for challenge in parse_challenges([header]):
        assert challenge.scheme == challenge.scheme.lower()


def test_challenges() -> None:
    one, two = parse_challenges(['Bearer realm="https://a/t?x=\\"1\\",2", service=reg , scope="a,b", Basic realm="r"'])
    assert (one.scheme, two.scheme) == ("bearer", "basic")
    assert one.parameters == {"realm": 'https://a/t?x="1",2', "service": "reg", "scope": "a,b"}
    assert two.parameters == {"realm": "r"}
