"""Names of images in registries, as Docker has them (distribution/reference): ``python:3.12`` is one on Docker Hub."""

from __future__ import annotations

import re

from attrs import frozen

DOCKER_HUB = "docker.io"
MAX_TEXT = 1024         # characters; a name has at most 255, a tag 128, a digest 135

_ALIASES = {"index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"}
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}", re.ASCII)


@frozen
class Name:
    """An image in a registry. ``digest`` wins over ``tag``; with neither it is the tag ``latest``."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.registry}/{self.repository}{tag}{'@' if self.digest else ''}{self.digest}"

    @property
    def pointer(self) -> str:
        """What the registry is asked for: the digest, or the tag."""
        return self.digest or self.tag


def parse_name(text: str) -> Name | None:
    """Take a name apart, completed as Docker does it; None if it isn't one."""
    if len(text) > MAX_TEXT:
        return None
    rest, at, digest = text.partition("@")
    path, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:         # the colon, if there is one, is that of the registry's port
        path, colon, tag = rest, "", ""
    registry, slash, repository = path.partition("/")
    if not slash or not _is_host(registry):
        registry, repository = DOCKER_HUB, path
    registry = registry.lower()
    if registry in _ALIASES:
        registry = DOCKER_HUB
    if registry == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    fine = (
        _HOST.fullmatch(registry) and _REPOSITORY.fullmatch(repository) and len(repository) <= 255
        and (_TAG.fullmatch(tag) or not colon) and (_DIGEST.fullmatch(digest) or not at)
    )
    return Name(registry, repository, tag if tag or digest else "latest", digest) if fine else None


def _is_host(first: str) -> bool:
    # A registry without a dot or a port could be the first part of a name on Docker Hub.
    return "." in first or ":" in first or first == "localhost" or first != first.lower()
