"""References: the forms that an image's name can have."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata.errors import ImageReferenceError
from pykata.images.name import Name, parse_name
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
    ("oci-archive:a.tar:v1", Source.OCI_ARCHIVE, "a.tar", "v1"),
    ("docker-daemon:app:1", Source.DOCKER_DAEMON, "app:1", ""),
    ("disk:/srv/root.ext4", Source.DISK, "/srv/root.ext4", ""),
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
    "", ":", ":x", "oci:", "oci::tag", "tar:", "dir:", "builtin:", "OCI:x", "http://x/y", "x y", "layout/", "docker://",
    "~/x", "oci:a\0b", "-", "a/-b", "a//b", "a:b:c", "a@b", "a@sha256:00", "python:", "python:.x", "x" * 2000,
    "-registry.test/a", "registry.test:port/a", "registry.test:123456/a", "a/B", "a__" + "_b", "docker://oci:x:y",
])
def test_everything_else_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ImageReferenceError) as caught:
        parse(text)
    assert caught.value.reference == text
    assert isinstance(caught.value, ValueError)
    for form in ("NAME[:TAG] in a registry", "oci:DIR[:TAG]", "docker-archive:FILE[:TAG]", "dir:ROOTFS", "tar:FILE",
                 "builtin:NAME"):
        assert form in caught.value.hint


D = "sha256:" + "0" * 64


@pytest.mark.parametrize(("text", "name"), [
    ("python", Name("docker.io", "library/python", "latest")),
    ("oci", Name("docker.io", "library/oci", "latest")),
    ("python:3.12-slim", Name("docker.io", "library/python", "3.12-slim")),
    ("docker://python:3.12", Name("docker.io", "library/python", "3.12")),
    ("docker:27", Name("docker.io", "library/docker", "27")),
    ("team/app", Name("docker.io", "team/app", "latest")),
    ("docker.io/python", Name("docker.io", "library/python", "latest")),
    ("index.docker.io/team/app:1", Name("docker.io", "team/app", "1")),
    ("localhost/app", Name("localhost", "app", "latest")),
    ("localhost:5000/a/b:c", Name("localhost:5000", "a/b", "c")),
    ("Registry.Test/app", Name("registry.test", "app", "latest")),
    ("[::1]:5000/app:1", Name("[::1]:5000", "app", "1")),
    ("registry.test/a/b/c:x", Name("registry.test", "a/b/c", "x")),
    (f"a/b@{D}", Name("docker.io", "a/b", "", D)),
    (f"registry.test:1/a:t@{D}", Name("registry.test:1", "a", "t", D)),
])
def test_names_in_registries(text: str, name: Name) -> None:
    reference = parse(text)
    assert (reference.source, reference.name) == (Source.REGISTRY, name)
    assert parse_name(str(name)) == name
    assert name.pointer == (name.digest or name.tag)


def test_what_is_no_text() -> None:
    with pytest.raises(ImageReferenceError):
        parse(None)  # type: ignore[arg-type]


@given(st.text())
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    with suppress(ImageReferenceError):
        assert parse(text).location
