"""Downloads blobs into the depot: several at a time, verified as they come, continued where they broke off."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from attrs import define, frozen

from pykata import host
from pykata.errors import ImageCorruptError, ImageError, PykataError, RegistryUnreachableError
from pykata.images.arriving import Arriving
from pykata.images.depot import Depot, explained, take, write_all
from pykata.images.registry.client import Known, Registry, usable_elsewhere
from pykata.images.registry.retry import PATIENCE, TransientError, pause, too_slow
from pykata.images.registry.settings import Endpoint, Settings
from pykata.images.stream import CHUNK

PROGRESS = 256 * 1024           # bytes that make a new start of the count of retries
TRICKLE = 1024                  # bytes a second; less than that is as good as nothing

Report = Callable[[str, str, int, int], None]
"""Told the digest of a blob, what happened, how many bytes are done and of how many."""


@frozen
class Source:
    """Where the blobs of an image are, and what is known of there."""

    settings: Settings
    known: Known
    endpoints: tuple[Endpoint, ...]


async def download_all(source: Source, depot: Depot, blobs: Sequence[Arriving], report: Report) -> None:
    """Download blobs, those first that are read first. What goes wrong is told to who reads them."""
    turns = anyio.Semaphore(max(1, source.settings.registries.parallel))

    async def one(blob: Arriving) -> None:
        try:
            await _Download(registry, source.endpoints, depot, blob, report).run()
        except PykataError as exc:
            for each in blobs:          # without this one the others are of no use
                each.fail(exc)
            tasks.cancel_scope.cancel()
        finally:
            turns.release()

    try:
        async with Registry(source.settings, source.known) as registry, anyio.create_task_group() as tasks:
            for blob in blobs:
                await turns.acquire()
                tasks.start_soon(one, blob)
    except Exception as exc:            # a bug; without this whoever reads would wait for ever
        for blob in blobs:
            blob.fail(exc)
        raise


@define
class _Download:
    registry: Registry
    endpoints: tuple[Endpoint, ...]
    depot: Depot
    blob: Arriving
    report: Report

    async def run(self) -> None:
        path = self.depot.blob(self.blob.digest)
        with explained(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The name has no suffix of its own. Another process may be downloading it, too: then it is here afterwards.
            async with host.locked(path.with_suffix(".lock")):
                if take(self.blob, self.depot):
                    self.report(self.blob.digest, "exists", self.blob.size, self.blob.size)
                    return
                part = path.with_suffix(".part")
                self.blob.opened(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                await self._fill(part)
                part.rename(path)
                self.blob.arrived(self.blob.size, whole=True)
        self.report(self.blob.digest, "downloaded", self.blob.size, self.blob.size)

    async def _fill(self, part: Path) -> None:
        """Make the file whole. If what an earlier process left of it turns out to be wrong, begin anew."""
        found = os.fstat(self.blob.descriptor).st_size
        try:
            if not 0 < found <= self.blob.size or not await self._complete(found):
                os.ftruncate(self.blob.descriptor, 0)
                await self._complete(0)
        except ImageCorruptError:
            _remove(part)
            raise

    async def _complete(self, found: int) -> bool:
        """Download what follows the first ``found`` bytes. False if the whole is wrong and those may be why."""
        algorithm, _, want = self.blob.digest.partition(":")
        writing = _Writing(self.blob.descriptor, hashlib.new(algorithm))
        if found:
            # Readers see none of it before it is verified: what they read can't be taken back.
            await anyio.to_thread.run_sync(writing.catch_up, found)
        try:
            await self._receive(writing, announce=not found)
        except ImageCorruptError:
            if found:
                return False
            raise
        if writing.hash.hexdigest() == want:
            return True
        if found:
            return False
        raise ImageCorruptError(
            f"the registry sends a blob with the digest {algorithm}:{writing.hash.hexdigest()} "
            f"instead of {self.blob.digest}", digest=self.blob.digest)

    async def _receive(self, writing: _Writing, *, announce: bool) -> None:
        endpoints, failures, since = list(self.endpoints), 0, writing.size
        while writing.size < self.blob.size:
            try:
                await self._append(endpoints[0], writing, announce)
            except TransientError as transient:
                if writing.size - since >= PROGRESS:
                    failures = 0
                since = writing.size
                if failures < self.registry.settings.registries.retries:
                    self.report(self.blob.digest, "retrying", writing.size, self.blob.size)
                    await pause(failures, transient)
                    failures += 1
                elif not self._elsewhere(endpoints, transient.error):
                    raise transient.error from transient
            except ImageError as exc:
                if not self._elsewhere(endpoints, exc):
                    raise

    def _elsewhere(self, endpoints: list[Endpoint], error: ImageError) -> bool:
        """Give the first of the endpoints up, if there is another one."""
        if len(endpoints) < 2 or not usable_elsewhere(error):
            return False
        del endpoints[0]
        return True

    async def _append(self, endpoint: Endpoint, writing: _Writing, announce: bool) -> None:
        size, timeout = self.blob.size, self.registry.settings.registries.timeout
        async with AsyncExitStack() as stack:
            with anyio.move_on_after(PATIENCE * timeout) as waiting:
                response, at = await stack.enter_async_context(
                    self.registry.blob(endpoint, self.blob.digest, writing.size))
            if waiting.cancelled_caught:
                raise too_slow(endpoint.host, self.registry.settings.registries)
            skip = writing.size - at            # it knows no ranges: what we have comes once more
            pace = _Pace(timeout)
            async for chunk in response.aiter_raw():
                pace.count(len(chunk), endpoint)
                data = memoryview(chunk)[min(skip, len(chunk)):]
                skip -= len(chunk) - len(data)
                if writing.size + len(data) > size:
                    raise self._wrong(f"more than {size} bytes")
                writing.add(data)
                if announce and data:
                    self.blob.arrived(writing.size)
                self.report(self.blob.digest, "downloading", writing.size, size)
        if writing.size < size:
            raise TransientError(self._wrong(f"{writing.size} bytes instead of {size}"))

    def _wrong(self, what: str) -> ImageCorruptError:
        return ImageCorruptError(f"the registry's blob {self.blob.digest} has {what}", digest=self.blob.digest)


@define
class _Writing:
    """The file, as far as it is written, and the hash of that."""

    descriptor: int
    hash: Any
    size: int = 0

    def catch_up(self, size: int) -> None:
        while self.size < size:
            data = os.pread(self.descriptor, min(4 * CHUNK, size - self.size), self.size)
            self.hash.update(data)
            self.size += len(data)

    def add(self, data: memoryview) -> None:
        write_all(self.descriptor, data, self.size)
        self.hash.update(data)
        self.size += len(data)


class _Pace:
    """Notices who sends just enough not to seem dead."""

    def __init__(self, timeout: float) -> None:
        self._window = 2 * timeout
        self._began = time.monotonic()
        self._bytes = 0

    def count(self, size: int, endpoint: Endpoint) -> None:
        self._bytes += size
        elapsed = time.monotonic() - self._began
        if elapsed > self._window:
            if self._bytes < TRICKLE * elapsed:
                raise TransientError(RegistryUnreachableError(
                    f"{endpoint.host} sends {self._bytes / elapsed:.0f} bytes a second"))
            self._began, self._bytes = time.monotonic(), 0


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
