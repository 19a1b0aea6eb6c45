"""References: the forms that an image's name can have."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata.errors import ImageReferenceError
from pykata.images.reference import Reference, Source, parse


@pytest.mark.parametrize(("text", "source", "location", "tag"), [
    ("oci:layout", Source.OCI, "layout", ""),
    ("oci:./layout:latest", Source.OCI, "./layout", "latest"),
    ("oci:/a b/c:v1.2", Source.OCI, "/a b/c", "v1.2"),
    ("oci:d:sha256:00ff", Source.OCI, "d", "sha256:00ff"),
    ("oci:d:", Source.OCI, "d", ""),
    ("docker-archive:a.tar", Source.DOCKER_ARCHIVE, "a.tar", ""),
    ("docker-archive:a.tar:python:3.12", Source.DOCKER_ARCHIVE, "a.tar", "python:3.12"),
    ("dir:/srv/root:fs", Source.DIRECTORY, "/srv/root:fs", ""),
    ("tar:a:b.tar.gz", Source.TARBALL, "a:b.tar.gz", ""),
    ("builtin:busybox", Source.BUILTIN, "busybox", ""),
    ("./images/app", Source.PATH, "./images/app", ""),
    ("../app:dev", Source.PATH, "../app", "dev"),
    ("/srv/app.tar", Source.PATH, "/srv/app.tar", ""),
])
def test_the_forms(text: str, source: Source, location: str, tag: str) -> None:
    reference = parse(text)
    assert reference == Reference(text, source, location, tag)
    assert str(reference.path) == location.removeprefix("./")


@pytest.mark.parametrize("text", [
    "", ":", ":x", "oci", "oci:", "oci::tag", "tar:", "dir:", "builtin:", "OCI:x", "http://x/y", "x y", "layout/",
    "~/x", "oci-archive:x.tar", "oci:a\0b", "docker-daemon:x", "-",
])
def test_everything_else_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ImageReferenceError) as caught:
        parse(text)
    assert caught.value.reference == text
    assert isinstance(caught.value, ValueError)
    for form in ("oci:DIR[:TAG]", "docker-archive:FILE[:TAG]", "dir:ROOTFS", "tar:FILE", "builtin:NAME"):
        assert form in caught.value.hint


@pytest.mark.parametrize("text", [
    "python:3.12", "python", "library/python:3.12-slim", "localhost:5000/a/b:c", "docker://python:3.12",
    "a/b@sha256:" + "0" * 64,
])
def test_a_name_in_a_registry_gets_a_way_out(text: str) -> None:
    with pytest.raises(ImageReferenceError, match="registry") as caught:
        parse(text)
    assert f"skopeo copy docker://{text.removeprefix('docker://')} oci:" in caught.value.hint


def test_what_is_no_text() -> None:
    with pytest.raises(ImageReferenceError):
        parse(None)  # type: ignore[arg-type]


@given(st.text())
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    with suppress(ImageReferenceError):
        assert parse(text).location
