"""The ways to name an image."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

from attrs import frozen

from pykata.errors import ImageReferenceError

FORMS = "oci:DIR[:TAG], docker-archive:FILE[:TAG], dir:ROOTFS, tar:FILE, builtin:NAME, ./PATH[:TAG]"


class Source(Enum):
    """Where an image comes from; the value is the prefix of the reference. What a mere path is, its content says."""

    OCI = "oci"
    DOCKER_ARCHIVE = "docker-archive"
    DIRECTORY = "dir"
    TARBALL = "tar"
    BUILTIN = "builtin"
    PATH = ""


@frozen
class Reference:
    """An image's name, taken apart. ``location`` is a path or a builtin's name; ``tag`` is empty if none is given."""

    text: str
    source: Source
    location: str
    tag: str = ""

    @property
    def path(self) -> Path:
        return Path(self.location)


_TAGGED = {Source.OCI, Source.DOCKER_ARCHIVE, Source.PATH}
_PREFIXES = {source.value for source in Source} - {""}
_PATH = re.compile(r"\.{0,2}/")
_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]*(:[0-9]+/[a-z0-9._/-]+)?(:[\w.-]+)?(@[a-z0-9]+:[0-9a-f]+)?", re.ASCII)


def parse(text: str) -> Reference:
    """Take a reference apart, without looking at any file.

    What follows the first colon after ``oci:DIR`` or ``docker-archive:FILE`` is the tag, as skopeo has it: there a path
    can't have a colon in it. A reference that starts with ``/``, ``./`` or ``../`` is the path of an OCI layout or of
    an archive. Raises :class:`~pykata.errors.ImageReferenceError`.
    """
    if not isinstance(text, str) or "\0" in text:
        raise ImageReferenceError(f"{text!r} is not an image reference", reference=str(text), hint=f"one of {FORMS}")
    if _PATH.match(text):
        source, location = Source.PATH, text
    else:
        prefix, colon, location = text.partition(":")
        if not colon or prefix not in _PREFIXES:
            raise ImageReferenceError(f"{text!r} names no kind of image", reference=text, hint=_hint(text))
        source = Source(prefix)
    tag = ""
    if source in _TAGGED:
        location, _, tag = location.partition(":")
    if not location:
        raise ImageReferenceError(f"{text!r} says no more than a kind of image", reference=text, hint=f"one of {FORMS}")
    return Reference(text, source, location, tag)


def _hint(text: str) -> str:
    if _PLAIN_NAME.fullmatch(text) or text.startswith(("docker:", "docker://")):
        name = text.removeprefix("docker:").removeprefix("//")
        return (f"names in a registry aren't supported yet: copy it first, for example with "
                f"skopeo copy docker://{name} oci:DIR:TAG, and use oci:DIR:TAG; or one of {FORMS}")
    return f"one of {FORMS}"
