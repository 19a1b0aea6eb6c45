"""From the name of an image to its manifest, at the first place that has it."""

from __future__ import annotations

from pykata.errors import ImageCorruptError, ImageError, RegistryError
from pykata.images.config import Platform, go_architecture
from pykata.images.depot import Depot, Record
from pykata.images.document import MAX_DOCUMENT, Document, parse_document
from pykata.images.manifest import (
    INDEXES,
    MANIFESTS,
    MAX_INDEXES,
    MAX_MANIFESTS,
    MAX_NESTING,
    Descriptor,
    best,
    is_index,
    parse_descriptor,
    parse_manifest,
)
from pykata.images.name import Name, parse_name
from pykata.images.registry.client import Known, Manifest, Registry, usable_elsewhere
from pykata.images.registry.download import Source
from pykata.images.registry.settings import Endpoint, find_settings
from pykata.spec import Registries


async def ask(
    name: Name, architecture: str, depot: Depot, known: Record | None, registries: Registries | None
) -> tuple[Record, Source]:
    """Ask the registry of ``name`` what it means, and keep that. ``known`` is what it meant the last time.

    Raises :class:`~pykata.errors.ImageError`, that of the last place that was asked.
    """
    settings = find_settings(registries)
    endpoints = settings.endpoints(name)
    if not endpoints:
        raise RegistryError(f"{name.registry} is blocked in registries.conf")
    learnt = Known()
    async with Registry(settings, learnt) as registry:
        for number, endpoint in enumerate(endpoints):
            try:
                record = await _Search(registry, endpoint, depot, architecture).find(name, known)
                return record, Source(settings, learnt, tuple(endpoints[number:]))
            except ImageError as exc:
                if not usable_elsewhere(exc) or endpoint is endpoints[-1]:
                    raise
    raise AssertionError("the last place returns or raises")


def source_of(record: Record, registries: Registries | None) -> Source:
    """Where the blobs of an image are that was found before."""
    name = parse_name(record.name)
    assert name is not None
    settings = find_settings(registries)
    return Source(settings, Known(), tuple(settings.endpoints(name)))


class _Search:
    """One look for an image at one place. What it reads is kept in the depot."""

    def __init__(self, registry: Registry, endpoint: Endpoint, depot: Depot, architecture: str) -> None:
        self._registry = registry
        self._endpoint = endpoint
        self._depot = depot
        self._architecture = go_architecture(architecture)
        self._indexes = 0

    async def find(self, name: Name, known: Record | None) -> Record:
        if known is not None and await self._registry.digest(self._endpoint, name.pointer) == known.top:
            return known
        top = await self._registry.manifest(self._endpoint, name.pointer)
        chosen, manifest = await self._chosen(top)
        config, _ = parse_manifest(manifest)
        if config.size > MAX_DOCUMENT:
            raise ImageCorruptError(f"its config has {config.size} bytes, more than {MAX_DOCUMENT}")
        raw = await self._registry.document(self._endpoint, config.digest, config.size)
        self._depot.put(config.digest, raw)
        self._depot.put(chosen.digest, chosen.raw)
        record = Record(str(name), self._architecture, top.digest, Descriptor(
            chosen.media_type, chosen.digest, len(chosen.raw), Platform("", "")))
        try:
            self._depot.describe(record)
        except ImageError:
            self._depot.remove(record)
            raise
        self._depot.save(record)
        return record

    async def _chosen(self, top: Manifest) -> tuple[Manifest, Document]:
        document = parse_document(top.raw, "manifest")
        if not is_index(document, top.media_type):
            return top, document
        descriptor = best(await self._flattened(document), self._architecture)
        manifest = await self._registry.manifest(self._endpoint, descriptor.digest)
        if len(manifest.raw) != descriptor.size:
            raise ImageCorruptError(f"its manifest has {len(manifest.raw)} bytes instead of {descriptor.size}",
                                    digest=descriptor.digest)
        document = parse_document(manifest.raw, "manifest")
        if is_index(document, descriptor.media_type or manifest.media_type):
            raise ImageCorruptError("its manifest is an index", digest=descriptor.digest)
        return manifest, document

    async def _flattened(self, index: Document, depth: int = 1) -> list[Descriptor]:
        """The manifests of an index and of the indexes in it."""
        found: list[Descriptor] = []
        for one in [parse_descriptor(listed) for listed in index.get("manifests").list()]:
            if one.media_type in INDEXES:
                found += await self._flattened(await self._inner(one, depth), depth + 1)
            elif one.media_type in MANIFESTS or not one.media_type:
                found.append(one)
            if len(found) > MAX_MANIFESTS:
                raise ImageCorruptError(f"its indexes list more than {MAX_MANIFESTS} manifests")
        return found

    async def _inner(self, descriptor: Descriptor, depth: int) -> Document:
        self._indexes += 1
        if self._indexes > MAX_INDEXES:
            raise ImageCorruptError(f"it has more than {MAX_INDEXES} indexes")
        if depth > MAX_NESTING:
            raise ImageCorruptError(f"its indexes are nested more than {MAX_NESTING} deep")
        inner = await self._registry.manifest(self._endpoint, descriptor.digest)
        document = parse_document(inner.raw, "index")
        if not is_index(document, inner.media_type):
            raise ImageCorruptError("its index is a manifest", digest=descriptor.digest)
        return document
