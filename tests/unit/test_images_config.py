"""Configs and other JSON of images, whatever is in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykata.errors import ImageCorruptError, ImageError, ImageUnsupportedError
from pykata.images.config import (
    Platform,
    chain_id,
    check_platform,
    parse_config,
    parse_diff_ids,
    parse_digest,
    parse_platform,
)
from pykata.images.document import MAX_DOCUMENT, Document, parse_document
from pykata.spec import ImageConfig

A, B = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


def document(value: object) -> Document:
    return parse_document(json.dumps(value).encode(), "config")


def test_a_whole_config() -> None:
    assert parse_config(document({"config": {
        "Entrypoint": ["/init", "-x"], "Cmd": ["a", ""],
        "Env": ["PATH=/bin", "EMPTY=", "EQ=a=b", "BARE", "=x", "PATH=/sbin"],
        "User": "1000:app", "WorkingDir": "/srv//app/../x/", "Labels": {"k": "v"}, "StopSignal": "SIGQUIT",
        "Volumes": {"/data": {}}, "ExposedPorts": {"80/tcp": {}}, "Unknown": [1],
    }})) == ImageConfig(
        entrypoint=("/init", "-x"), cmd=("a", ""), env={"PATH": "/sbin", "EMPTY": "", "EQ": "a=b", "BARE": ""},
        user="1000:app", workdir="/srv/x", labels={"k": "v"}, stop_signal="SIGQUIT",
    )


@pytest.mark.parametrize("value", [
    {}, {"config": None}, {"config": {}},
    {"config": {"Entrypoint": None, "Cmd": None, "Env": None, "User": None, "WorkingDir": None, "Labels": None}},
])
def test_what_is_missing_or_null_has_a_default(value: Any) -> None:
    assert parse_config(document(value)) == ImageConfig()


@pytest.mark.parametrize(("given", "workdir"), [("", "/"), ("app", "/app"), ("/", "/"), ("//", "/"), ("../..", "/")])
def test_the_working_directory_is_absolute(given: str, workdir: str) -> None:
    assert parse_config(document({"config": {"WorkingDir": given}})).workdir == workdir


@pytest.mark.parametrize(("value", "why"), [
    ([], "config is [], not an object"),
    ({"config": []}, "config: config is [], not an object"),
    ({"config": {"Cmd": "sh"}}, "config: config.Cmd is 'sh', not an array"),
    ({"config": {"Cmd": ["sh", 1]}}, "config: config.Cmd[1] is 1, not text"),
    ({"config": {"Entrypoint": [["x"]]}}, "config: config.Entrypoint[0]"),
    ({"config": {"Env": {"A": "B"}}}, "config: config.Env"),
    ({"config": {"Env": ["A=\0"]}}, "config: config.Env[0]"),
    ({"config": {"User": 0}}, "config: config.User is 0, not text"),
    ({"config": {"WorkingDir": "/a\0b"}}, "without NUL"),
    ({"config": {"Labels": ["x"]}}, "config: config.Labels"),
    ({"config": {"Labels": {"x": {}}}}, "config: config.Labels.x"),
    ({"config": {"StopSignal": True}}, "config: config.StopSignal"),
])
def test_a_value_of_the_wrong_type_is_named(value: object, why: str) -> None:
    with pytest.raises(ImageCorruptError) as caught:
        parse_config(document(value))
    assert why in str(caught.value)


@pytest.mark.parametrize("raw", [
    b"", b"{", b"\xff", b"nul", b"[" * 100_000, b'{"a":' * 50_000, b"{}x", b"1" * 5000, b" " * (MAX_DOCUMENT + 1),
])
def test_what_is_no_json(raw: bytes) -> None:
    with pytest.raises(ImageCorruptError, match="index"):
        parse_document(raw, "index").get("x")


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(ImageCorruptError, match="surrogates"):
        parse_config(parse_document(b'{"config": {"User": "\\ud800"}}', "config"))


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, True, "1", None, float("nan")])
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(ImageCorruptError):
        Document(value, "size").integer()


@pytest.mark.parametrize(("value", "error"), [
    ("sha256:" + "A" * 64, ImageUnsupportedError), ("md5:" + "0" * 32, ImageUnsupportedError),
    ("sha256:" + "a" * 63, ImageUnsupportedError), ("sha256:../../etc/passwd", ImageCorruptError),
    ("sha256:" + "a" * 64 + "\n", ImageCorruptError), ("", ImageCorruptError), (None, ImageCorruptError),
    ("a" * 64, ImageCorruptError),
])
def test_what_is_no_digest(value: object, error: type[ImageError]) -> None:
    with pytest.raises(error):
        parse_digest(Document(value, "digest"))


def test_diff_ids() -> None:
    assert parse_diff_ids(document({"rootfs": {"type": "layers", "diff_ids": [A, B]}})) == [A, B]
    assert parse_diff_ids(document({})) == []
    with pytest.raises(ImageUnsupportedError, match="windows"):
        parse_diff_ids(document({"rootfs": {"type": "windows"}}))


def test_the_chain_id_is_that_of_the_specification() -> None:
    # image-spec, config.md: ChainID(L0|L1) = Digest(ChainID(L0) + " " + DiffID(L1))
    assert chain_id([A]) == A
    assert chain_id([A, B]) == "sha256:ccd722928bd92476ba1745586fed6e45a102504185ad88cd89e01ff116fd146c"
    assert chain_id([A, B]) != chain_id([B, A])
    assert chain_id([A, B, A]) != chain_id([A, B])
    assert chain_id([]).startswith("sha256:")


@pytest.mark.parametrize(("platform", "rank"), [
    (Platform("linux", "amd64"), 0), (Platform("linux", "amd64", "v1"), 1), (Platform("linux", "amd64", "v3"), 3),
    (Platform("linux", "amd64", "v9"), None), (Platform("linux", "arm64"), None), (Platform("windows", "amd64"), None),
    (Platform("unknown", "unknown"), None), (Platform("", ""), 0),
])
def test_how_a_platform_fits(platform: Platform, rank: int | None) -> None:
    assert platform.rank("amd64") == rank


def test_a_platform_that_doesn_t_fit_is_named() -> None:
    check_platform(Platform("linux", "arm64", "v8"), "aarch64")
    with pytest.raises(ImageUnsupportedError, match="it is for linux/arm64/v8, not for linux/amd64"):
        check_platform(Platform("linux", "arm64", "v8"), "x86_64")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["config", "rootfs", "diff_ids", "type", "Cmd", "Env", "User", "Labels", "os", "WorkingDir"]),
        inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(json_values | st.binary(max_size=30))
def test_any_json_is_a_config_or_refused(value: object) -> None:
    try:
        found = parse_document(value if isinstance(value, bytes) else json.dumps(value).encode(), "config")
        assert isinstance(parse_config(found), ImageConfig)
        parse_platform(found)
        parse_diff_ids(found)
    except (ImageCorruptError, ImageUnsupportedError):
        pass
