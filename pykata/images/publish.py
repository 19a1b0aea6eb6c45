"""Takes images of the depot elsewhere: into an OCI layout, and into a registry (distribution-spec, "Push")."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import anyio.to_thread

from pykata.errors import ImageError, ImageNotFoundError
from pykata.images.depot import Depot, Record, explained
from pykata.images.manifest import TAG
from pykata.images.name import Name
from pykata.images.stream import CHUNK
from pykata.spec import Registries


def check_whole(depot: Depot, record: Record) -> list[str]:
    """The digests of all blobs of an image. Raises ImageNotFoundError if one was removed."""
    digests = depot.digests(record)
    for digest in digests:
        if not depot.blob(digest).exists():
            raise ImageNotFoundError(f"the blob {digest} of {record.name} isn't here any more", hint="pull it again")
    return digests


def save(depot: Depot, record: Record, path: Path) -> None:
    """Write an OCI layout with the image to ``path``, which must not be there yet. It appears when it is whole.

    It is an archive, a tar of the layout, if ``path`` says so, and else a directory.
    """
    if path.exists():
        raise ImageError(f"{path} is there already", hint="remove it, or name another one")
    digests = check_whole(depot, record)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as work:
            layout = Path(work, "layout")
            if path.suffix == ".tar":
                _write_archive(depot, record, digests, layout)
            else:
                _write_folder(depot, record, digests, layout)
            layout.rename(path)


def _documents(record: Record) -> dict[str, str]:
    manifest = record.manifest
    tag = record.name.rpartition("/")[2].partition("@")[0].partition(":")[2] or "latest"
    index = {"schemaVersion": 2, "manifests": [{
        "mediaType": manifest.media_type, "digest": manifest.digest, "size": manifest.size, "annotations": {TAG: tag}}]}
    return {"index.json": json.dumps(index), "oci-layout": '{"imageLayoutVersion": "1.0.0"}'}


def _write_folder(depot: Depot, record: Record, digests: list[str], layout: Path) -> None:
    for digest in digests:
        target = layout / "blobs" / digest.replace(":", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(depot.blob(digest), target)
    for name, text in _documents(record).items():
        (layout / name).write_text(text)


def _write_archive(depot: Depot, record: Record, digests: list[str], path: Path) -> None:
    with path.open("xb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, text in _documents(record).items():
            found = tarfile.TarInfo(name)
            found.size = len(text)
            tar.addfile(found, io.BytesIO(text.encode()))
        for digest in dict.fromkeys(digests):
            with depot.blob(digest).open("rb") as blob:
                found = tarfile.TarInfo(f"blobs/{digest.replace(':', '/')}")
                found.size = os.fstat(blob.fileno()).st_size
                tar.addfile(found, blob)


async def push(depot: Depot, record: Record, name: Name, registries: Registries | None) -> str:
    """Put the image into the registry of ``name``; returns the digest of its manifest. What is there isn't sent."""
    from pykata.images.registry.client import Known, Registry
    from pykata.images.registry.settings import find_settings

    digests = await anyio.to_thread.run_sync(check_whole, depot, record)
    manifest, *blobs = digests
    settings = find_settings(registries)
    endpoint = settings.own(name)
    async with Registry(settings, Known()) as registry:
        for digest in dict.fromkeys(blobs):
            path = depot.blob(digest)
            await registry.upload(endpoint, digest, path.stat().st_size, partial(_content, path))
        raw = await anyio.to_thread.run_sync(depot.blob(manifest).read_bytes)
        await registry.put_manifest(endpoint, name.pointer, raw, record.manifest.media_type)
    return manifest


async def _content(path: Path) -> AsyncIterator[bytes]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while data := await anyio.to_thread.run_sync(os.read, descriptor, CHUNK):
            yield data
    finally:
        os.close(descriptor)
