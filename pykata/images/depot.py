"""What was pulled, on disk: blobs by their digest, and for each name the image that it meant when it was asked for.

Safe for many processes at once, and at any moment of a crash: a file gets its name when it is whole. A blob is verified
whenever it is read, so nothing has to be flushed for it to be trusted later. ``blobs`` is as in an OCI layout.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attrs import frozen

from pykata import host
from pykata.errors import DiskFullError, HostError, ImageCorruptError, ImageError, PykataError
from pykata.images.arriving import Arriving
from pykata.images.config import Platform, parse_digest
from pykata.images.document import Document, parse_document
from pykata.images.manifest import Descriptor, parse_manifest
from pykata.images.oci import Described, describe, read_document
from pykata.images.store import Folder

FORMAT = 1


@frozen
class Record:
    """What a name means. ``top`` is the digest that the tag points at, of a manifest or of an index above it."""

    name: str
    architecture: str
    top: str
    manifest: Descriptor

    @property
    def stem(self) -> str:
        """A name of a file for it: those of images may be longer than a file's can be."""
        return hashlib.sha256(f"{self.name} {self.architecture}".encode()).hexdigest()


@frozen
class Depot:
    """A directory of images."""

    path: Path

    def blob(self, digest: str) -> Path:
        return self.path / "blobs" / digest.replace(":", "/")

    def record_path(self, name: str, architecture: str) -> Path:
        stem = Record(name, architecture, "", Descriptor("", "", 0, Platform("", ""))).stem
        return self.path / "names" / f"{stem}.json"

    def find(self, name: str, architecture: str) -> Record | None:
        """The record of a name."""
        return _read(self.record_path(name, architecture))

    def use(self, record: Record) -> None:
        """Note that an image is used now: what was not for the longest time is removed first."""
        for path in (self.record_path(record.name, record.architecture), *map(self.blob, self.digests(record)[:2])):
            with suppress(OSError):
                os.utime(path)

    def records(self) -> Iterator[tuple[Record, float]]:
        """All there are, with the time of their last use, in seconds since 1970."""
        for path in sorted((self.path / "names").glob("*.json")):
            record = _read(path)
            with suppress(FileNotFoundError):
                if record is not None:
                    yield record, path.stat().st_mtime

    def save(self, record: Record) -> None:
        value = {
            "format": FORMAT, "name": record.name, "architecture": record.architecture, "top": record.top,
            "manifest": {"mediaType": record.manifest.media_type, "digest": record.manifest.digest,
                         "size": record.manifest.size},
        }  # fmt: skip
        self.write(self.record_path(record.name, record.architecture), json.dumps(value, indent=1).encode())

    def put(self, digest: str, raw: bytes) -> None:
        """Keep a document, which is verified before."""
        algorithm, _, want = digest.partition(":")
        if hashlib.new(algorithm, raw).hexdigest() != want:
            raise ImageCorruptError(f"the document {digest} isn't what its digest says", digest=digest)
        self.write(self.blob(digest), raw)

    def remove(self, record: Record) -> None:
        """Forget a name, and the blobs that no other one has. Whoever reads one of them can go on."""
        self.record_path(record.name, record.architecture).unlink(missing_ok=True)
        kept = {digest for other, _ in self.records() for digest in self.digests(other)}
        for digest in self.digests(record):
            if digest not in kept:
                self.blob(digest).unlink(missing_ok=True)
        for step in (self.path / "steps").glob("*.json"):
            with suppress(OSError, ImageError):     # those whose layer went; see pykata.images.build
                if not self.blob(parse_digest(parse_document(step.read_bytes(), "step").get("digest"))).exists():
                    step.unlink()

    def describe(self, record: Record) -> Described:
        """What the metadata of an image says. Raises :class:`~pykata.errors.ImageError` if it isn't here."""
        return describe(Folder(self.path), record.manifest, record.architecture)

    def digests(self, record: Record) -> list[str]:
        """The blobs of an image: manifest, config, layers; those that are known."""
        try:
            config, layers = parse_manifest(read_document(Folder(self.path), record.manifest, "manifest"))
        except ImageError:
            return [record.manifest.digest]
        return [record.manifest.digest, config.digest, *(layer.digest for layer in layers)]

    def has(self, digest: str, size: int) -> bool:
        """Whether a blob is here, as far as its size tells. It counts as used now."""
        try:
            path = self.blob(digest)
            if path.stat().st_size != size:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        except PermissionError:         # another user's cache, shared with us
            pass
        return True

    def write(self, path: Path, raw: bytes) -> None:
        """Write a file of the depot, whole or not at all."""
        with explained(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh = path.parent / f"{path.name}.{os.urandom(4).hex()}.new"
            try:
                fresh.write_bytes(raw)
                fresh.rename(path)
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise


def find_depot() -> Depot:
    return Depot(host.cache_dir() / "images")


def _read(path: Path) -> Record | None:
    """A record; one that is damaged or of another version is none."""
    try:
        document = parse_document(path.read_bytes(), "record")
        if document.get("format").value != FORMAT:
            return None
        return _parsed(document)
    except (OSError, PykataError):
        return None


def _parsed(document: Document) -> Record:
    manifest = document.get("manifest")
    descriptor = Descriptor(manifest.get("mediaType").text(), parse_digest(manifest.get("digest")),
                            manifest.get("size").integer(), Platform("", ""))
    return Record(document.get("name").text(), document.get("architecture").text(),
                  parse_digest(document.get("top")), descriptor)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the system says about ``path``, as one of our errors."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"no space left for {path}", hint="pykata rmi, or another PYKATA_CACHE") from exc
        raise HostError(f"can't write {path}: {exc.strerror}") from exc


def write_all(descriptor: int, data: memoryview, at: int) -> None:
    """Write all of ``data`` into a file at an offset."""
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


def take(blob: Arriving, depot: Depot) -> bool:
    """Open a blob that is in the depot. It counts as used now."""
    try:
        descriptor = os.open(depot.blob(blob.digest), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    with suppress(OSError):
        os.utime(descriptor)
    if os.fstat(descriptor).st_size != blob.size:       # the host lost power: its name was kept, its data not
        os.close(descriptor)
        depot.blob(blob.digest).unlink(missing_ok=True)
        return False
    blob.opened(descriptor)
    blob.arrived(blob.size, whole=True)
    return True
