"""Images of a running Docker or Podman, over its socket (Docker Engine API: ImageInspect, ImageGet)."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import IO
from urllib.parse import quote

from pykata.errors import ImageCorruptError, ImageError, ImageNotFoundError, ImageReferenceError
from pykata.images.config import chain_id, check_platform, parse_config, parse_digest, parse_platform
from pykata.images.docker_archive import find_in_archive
from pykata.images.document import MAX_DOCUMENT, Document, parse_document
from pykata.images.limits import Limits
from pykata.images.reference import Reference, Source
from pykata.images.spool import Poll, spooled
from pykata.images.store import open_store
from pykata.images.stream import CHUNK
from pykata.spec import Image

TICK = 0.1              # seconds after which a wait looks whether it is still wanted
MAX_HEAD = 64 * 1024


def find_in_daemon(reference: Reference, architecture: str, limits: Limits, poll: Poll) -> Image:
    """Find an image by what the daemon says of it; its layers come when they are read."""
    path = find_socket()
    name = quote(reference.location, safe="/:@")
    with closing(_get(path, f"/images/{name}/json", reference.location, poll)) as chunks:
        raw = b"".join(_bounded(chunks))
    inspected = parse_document(raw, "image")
    platform = Document({key: inspected.get(name).value for key, name in (
        ("os", "Os"), ("architecture", "Architecture"), ("variant", "Variant"))}, "image")
    check_platform(parse_platform(platform), architecture)
    identity = parse_digest(inspected.get("Id"))
    diff_ids = [parse_digest(layer) for layer in inspected.get("RootFS").get("Layers").list()]
    config = parse_config(Document({"config": inspected.get("Config").value}, "image"))
    digest = chain_id(diff_ids)
    return Image(
        reference=reference.text, digest=digest, config=config, architecture=architecture,
        write_tar=partial(_write, path, identity, digest, architecture, limits),
    )


def find_socket() -> Path:
    """Where the daemon listens: ``$DOCKER_HOST``, else the usual places of Docker and Podman."""
    if named := os.environ.get("DOCKER_HOST"):
        if not named.startswith("unix://"):
            raise ImageError(f"DOCKER_HOST={named!r} is not a unix socket", hint="unix:///path, or unset it")
        return Path(named.removeprefix("unix://"))
    runtime = os.environ.get("XDG_RUNTIME_DIR", "/nonexistent")
    usual = [Path("/var/run/docker.sock"), Path(runtime, "docker.sock"), Path(runtime, "podman/podman.sock"),
             Path("/run/podman/podman.sock")]
    found = next((path for path in usual if path.is_socket()), None)
    if found is None:
        raise ImageError("neither Docker nor Podman is running here", hint="start it, or say where in DOCKER_HOST")
    return found


def _write(path: Path, identity: str, digest: str, architecture: str, limits: Limits, dest: IO[bytes]) -> None:
    # Its id rather than its name: a name may have moved on since.
    chunks = _get(path, f"/images/{identity}/get", identity, dest.flush)
    archive = spooled(chunks, f"the archive of {identity}", limits)
    try:
        saved = Reference(identity, Source.DOCKER_ARCHIVE, str(archive))
        image = find_in_archive(open_store(archive), saved, architecture, limits)
        if image.digest != digest:
            raise ImageCorruptError(f"the daemon saves other layers than it says {identity} has", digest=identity)
        assert image.write_tar is not None
        image.write_tar(dest)
    finally:
        archive.unlink(missing_ok=True)


def _get(path: Path, target: str, name: str, poll: Poll) -> Generator[bytes, None, None]:
    """The body of an answer. HTTP/1.0 has no chunks, and its end is that of the connection."""
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(TICK)
        try:
            connection.connect(str(path))
            connection.sendall(f"GET {target} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
            chunks = _received(connection, poll)
            status, length, body = _head(chunks)
            _check(status, name, path)
            yield body
            received = len(body)
            for chunk in chunks:
                received += len(chunk)
                yield chunk
        except OSError as exc:
            raise ImageError(f"can't talk to {path}: {exc.strerror or exc}", hint="is it running, and are you in its "
                             "group?") from exc
    if length is not None and received != length:
        raise ImageCorruptError(f"{path} sends {received} bytes of {name} instead of {length}")


def _received(connection: socket.socket, poll: Poll) -> Iterator[bytes]:
    while True:
        poll()
        try:
            chunk = connection.recv(CHUNK)
        except TimeoutError:
            continue
        if not chunk:
            return
        yield chunk


def _head(chunks: Iterator[bytes]) -> tuple[int, int | None, bytes]:
    head = b""
    while b"\r\n\r\n" not in head and len(head) < MAX_HEAD:
        chunk = next(chunks, b"")
        if not chunk:
            break
        head += chunk
    head, _, body = head.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    words = first.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise ImageError("what listens on the daemon's socket doesn't speak HTTP")
    lengths = [line.partition(b":")[2].strip() for line in lines if line.lower().startswith(b"content-length:")]
    return int(words[1]), int(lengths[0]) if lengths and lengths[0].isdigit() else None, body


def _check(status: int, name: str, path: Path) -> None:
    if status == 200:
        return
    if status == 404:
        raise ImageNotFoundError(f"the daemon at {path} has no image {name!r}", hint="see docker images")
    if status == 400:
        raise ImageReferenceError(f"the daemon at {path} takes {name!r} for no name")
    raise ImageError(f"the daemon at {path} answers {status}")


def _bounded(chunks: Iterator[bytes]) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > MAX_DOCUMENT:
            raise ImageCorruptError(f"the daemon's answer has more than {MAX_DOCUMENT} bytes")
        yield chunk
