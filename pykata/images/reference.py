"""The ways to name an image."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

from attrs import frozen

from pykata.errors import ImageReferenceError
from pykata.images.name import Name, parse_name

FORMS = (
    "NAME[:TAG] in a registry, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:TAG], docker-daemon:NAME, "
    "dir:ROOTFS, tar:FILE, disk:FILE, qcow2:FILE, builtin:NAME, ./PATH[:TAG]"
)


class Source(Enum):
    """Where an image comes from; the value is the prefix of the reference. What a mere path is, its content says."""

    REGISTRY = "docker"
    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"
    DOCKER_DAEMON = "docker-daemon"
    DIRECTORY = "dir"
    TARBALL = "tar"
    DISK = "disk"
    QCOW2 = "qcow2"
    BUILTIN = "builtin"
    PATH = ""


@frozen
class Reference:
    """An image's name, taken apart. ``location`` is a path or a name; ``tag`` is empty if none is given.

    ``name`` is that of an image in a registry.
    """

    text: str
    source: Source
    location: str
    tag: str = ""
    name: Name | None = None

    @property
    def path(self) -> Path:
        return Path(self.location)


_TAGGED = {Source.OCI, Source.OCI_ARCHIVE, Source.DOCKER_ARCHIVE, Source.PATH}
_PREFIXES = {source.value for source in Source} - {"", "docker"}
_PATH = re.compile(r"\.{0,2}/")


def parse(text: str) -> Reference:
    """Take a reference apart, without looking at any file.

    What follows the first colon after ``oci:DIR`` or ``docker-archive:FILE`` is the tag, as skopeo has it: there a path
    can't have a colon in it. A reference that starts with ``/``, ``./`` or ``../`` is the path of an OCI layout or of
    an archive. Everything else without a known prefix is a name in a registry, also as ``docker://NAME``. Raises
    :class:`~pykata.errors.ImageReferenceError`.
    """
    if not isinstance(text, str) or "\0" in text:
        raise ImageReferenceError(f"{text!r} is not an image reference", reference=str(text), hint=f"one of {FORMS}")
    if _PATH.match(text):
        source, location = Source.PATH, text
    else:
        prefix, colon, location = text.partition(":")
        if not colon or prefix not in _PREFIXES:
            return _in_registry(text)
        source = Source(prefix)
    tag = ""
    if source in _TAGGED:
        location, _, tag = location.partition(":")
    if not location:
        raise ImageReferenceError(f"{text!r} says no more than a kind of image", reference=text, hint=f"one of {FORMS}")
    return Reference(text, source, location, tag)


def _in_registry(text: str) -> Reference:
    name = parse_name(text.removeprefix("docker://"))
    if name is None:
        raise ImageReferenceError(f"{text[:300]!r} names no image", reference=text, hint=f"one of {FORMS}")
    return Reference(text, Source.REGISTRY, f"{name.registry}/{name.repository}", name.tag, name)
