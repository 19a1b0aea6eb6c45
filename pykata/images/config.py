"""The config of an image (image-spec, config.md) as pykata uses it."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Sequence

from attrs import frozen

from pykata.errors import ImageCorruptError, ImageUnsupportedError
from pykata.images.document import Document
from pykata.spec import ImageConfig

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""The names of the kernel (``uname -m``) and those of Go, which images use."""

VARIANTS = {"amd64": ("", "v1", "v2", "v3"), "arm64": ("", "v8")}
"""Those that we can run, the least demanding first. A later one may have instructions that the CPU lacks."""

DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}", re.ASCII)


@frozen
class Platform:
    """What an image is made for, in the words of images: ``linux``, ``amd64``."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def rank(self, wanted: str) -> int | None:
        """How well it fits ``wanted`` (0 is best), None if it doesn't. An image that doesn't say may fit."""
        if self.os not in ("", "linux") or self.architecture not in ("", wanted):
            return None
        variants = VARIANTS.get(wanted, ("",))
        return variants.index(self.variant) if self.variant in variants else None


def go_architecture(architecture: str) -> str:
    """``x86_64`` as images call it: ``amd64``. Go's own names are taken as well."""
    return ARCHITECTURES.get(architecture, architecture)


def parse_platform(document: Document) -> Platform:
    return Platform(document.get("os").text(), document.get("architecture").text(), document.get("variant").text())


def parse_digest(document: Document) -> str:
    """A digest that we can verify, which is also safe as a part of a path."""
    digest = document.text()
    if DIGEST.fullmatch(digest):
        return digest
    if re.fullmatch(r"[a-z0-9]+([+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+", digest):
        raise ImageUnsupportedError(f"{document.where} is {digest[:200]!r}, which can't be verified",
                                    hint="sha256 and sha512 can")
    raise document.wrong("a digest")


def check_platform(platform: Platform, architecture: str) -> None:
    wanted = go_architecture(architecture)
    if platform.rank(wanted) is None:
        raise ImageUnsupportedError(f"it is for {platform}, not for linux/{wanted}")


def parse_config(document: Document) -> ImageConfig:
    """The part of a config that says how to run the image."""
    config = document.get("config")
    workdir = config.get("WorkingDir").text()
    env: dict[str, str] = {}
    for variable in config.get("Env").texts():
        name, _, value = variable.partition("=")
        if name:
            env[name] = value
    return ImageConfig(
        entrypoint=config.get("Entrypoint").texts(), cmd=config.get("Cmd").texts(), env=env,
        user=config.get("User").text(), labels=config.get("Labels").text_map(),
        workdir=posixpath.normpath("/" + workdir.lstrip("/")), stop_signal=config.get("StopSignal").text(),
    )


def parse_diff_ids(document: Document) -> list[str]:
    """The digests of the uncompressed layers, lowest first."""
    rootfs = document.get("rootfs")
    kind = rootfs.get("type").text("layers")
    if kind != "layers":
        raise ImageUnsupportedError(f"its rootfs is of type {kind[:100]!r}")
    return [parse_digest(element) for element in rootfs.get("diff_ids").list()]


def check_layers(diff_ids: Sequence[str], layers: Sequence[object]) -> None:
    if len(diff_ids) != len(layers):
        raise ImageCorruptError(f"its config names {len(diff_ids)} layers, its manifest {len(layers)}")


def chain_id(diff_ids: Sequence[str]) -> str:
    """What identifies the filesystem that the layers make (image-spec, config.md, "Layer ChainID").

    Images that share their layers have it in common, however those are compressed.
    """
    chain = ""
    for diff_id in diff_ids:
        chain = f"sha256:{hashlib.sha256(f'{chain} {diff_id}'.encode()).hexdigest()}" if chain else diff_id
    return chain or f"sha256:{hashlib.sha256().hexdigest()}"
