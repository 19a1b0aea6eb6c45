"""What a pull asks of a registry: manifests and blobs (distribution-spec, "Pull"; RFC 9110 for ranges)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import httpx
from attrs import define, field, frozen

from pykata.errors import (
    ImageCorruptError,
    ImageError,
    ImageNotFoundError,
    ImageUnauthorizedError,
    PykataError,
    RateLimitedError,
    RegistryError,
    RegistryTLSError,
    printable,
)
from pykata.images.config import DIGEST
from pykata.images.document import MAX_DOCUMENT, parse_document
from pykata.images.manifest import INDEXES, MANIFESTS
from pykata.images.registry.auth import Authorizations, authorize, parse_challenges, unauthorized
from pykata.images.registry.credentials import find_credentials
from pykata.images.registry.http import MAX_ERROR, Http, origin, read_bounded
from pykata.images.registry.retry import TransientError, retried, retry_after
from pykata.images.registry.settings import Endpoint, Settings

PUSH = "pull,push"

_ACCEPT = ", ".join((*MANIFESTS, *INDEXES))
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d+/(?:\d+|\*)", re.ASCII)


@define
class Known:
    """What was learnt about registries: also good for the connections of another event loop."""

    authorizations: Authorizations = field(factory=Authorizations)
    schemes: dict[str, str] = field(factory=dict)


@frozen
class Manifest:
    """A manifest or an index as it was sent; ``digest`` is that of ``raw``."""

    raw: bytes = field(repr=False)
    media_type: str
    digest: str


class Registry:
    """The registries that an image may come from, as a context manager: its connections are closed when it is left."""

    def __init__(self, settings: Settings, known: Known) -> None:
        self.settings = settings
        self.known = known
        self._http = Http(settings)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def manifest(self, endpoint: Endpoint, pointer: str) -> Manifest:
        """The manifest or index that a tag or digest points at. Raises :class:`~pykata.errors.ImageError`."""

        async def attempt() -> Manifest:
            async with self._get(endpoint, f"manifests/{pointer}", {"Accept": _ACCEPT}) as response:
                raw = await read_bounded(response, MAX_DOCUMENT, "a manifest")
                media_type = response.headers.get("content-type", "").partition(";")[0].strip()
                stated = response.headers.get("docker-content-digest", "")
                return Manifest(raw, media_type, _verified(raw, pointer, stated, endpoint))

        return await retried(attempt, self.settings.registries, endpoint.host)

    async def digest(self, endpoint: Endpoint, pointer: str) -> str:
        """What a tag points at now, as far as the registry says it without sending it; else empty."""

        async def attempt() -> str:
            async with self._get(endpoint, f"manifests/{pointer}", {"Accept": _ACCEPT}, method="HEAD") as response:
                stated: str = response.headers.get("docker-content-digest", "")
                return stated if DIGEST.fullmatch(stated) else ""

        try:
            return await retried(attempt, self.settings.registries, endpoint.host)
        except RegistryError as exc:
            if type(exc) is RegistryError:      # it knows no HEAD
                return ""
            raise

    async def document(self, endpoint: Endpoint, digest: str, size: int) -> bytes:
        """A small blob, not verified yet."""

        async def attempt() -> bytes:
            async with self._get(endpoint, f"blobs/{digest}", {}) as response:
                return await read_bounded(response, min(size, MAX_DOCUMENT), f"the blob {digest}")

        return await retried(attempt, self.settings.registries, endpoint.host)

    @asynccontextmanager
    async def blob(self, endpoint: Endpoint, digest: str, start: int) -> AsyncIterator[tuple[httpx.Response, int]]:
        """A blob from byte ``start`` on, and where the answer begins: at 0 if the registry knows no ranges.

        Raises TransientError and :class:`~pykata.errors.ImageError`.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        async with self._get(endpoint, f"blobs/{digest}", headers) as response:
            at = 0
            if response.status_code == 206:
                found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
                at = int(found[1]) if found else -1
                if at != start:
                    raise RegistryError(f"{endpoint.host} sends another part of {digest} than it was asked for")
            yield response, at

    async def upload(
        self, endpoint: Endpoint, digest: str, size: int, content: Callable[[], AsyncIterator[bytes]]
    ) -> None:
        """Put a blob there, unless it is. ``content`` gives its bytes, from the start each time."""

        async def attempt() -> None:
            url = await self._url(endpoint, f"blobs/{digest}")
            async with self._exchange(endpoint, url, {}, "HEAD", PUSH) as response:
                if response.status_code == 200:
                    return
            start = await self._url(endpoint, "blobs/uploads/")
            async with self._exchange(endpoint, start, {}, "POST", PUSH) as response:
                await self._check(endpoint, f"blobs/{digest}", response, "POST", 202)
                target = httpx.URL(start).join(response.headers.get("location", ""))
            if origin(target) != origin(httpx.URL(start)):
                raise RegistryError(f"{endpoint.host} wants uploads to go to {target.host}")
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            where = str(target.copy_merge_params({"digest": digest}))
            async with self._exchange(endpoint, where, headers, "PUT", PUSH, content) as response:
                await self._check(endpoint, f"blobs/{digest}", response, "PUT", 201)

        await retried(attempt, self.settings.registries, endpoint.host, patient=True)

    async def put_manifest(self, endpoint: Endpoint, pointer: str, raw: bytes, media_type: str) -> None:
        """Put a manifest there, under a tag or its digest."""

        async def attempt() -> None:
            url = await self._url(endpoint, f"manifests/{pointer}")
            headers = {"Content-Type": media_type}
            async with self._exchange(endpoint, url, headers, "PUT", PUSH, lambda: raw) as response:
                await self._check(endpoint, f"manifests/{pointer}", response, "PUT", 201)

        await retried(attempt, self.settings.registries, endpoint.host)

    @asynccontextmanager
    async def _get(
        self, endpoint: Endpoint, path: str, headers: Mapping[str, str], method: str = "GET"
    ) -> AsyncIterator[httpx.Response]:
        async with self._exchange(endpoint, await self._url(endpoint, path), headers, method, "pull") as response:
            await self._check(endpoint, path, response, method)
            yield response

    async def _url(self, endpoint: Endpoint, path: str) -> str:
        return f"{await self._scheme(endpoint)}://{endpoint.host}/v2/{endpoint.repository}/{path}"

    @asynccontextmanager
    async def _exchange(
        self, endpoint: Endpoint, url: str, headers: Mapping[str, str], method: str, actions: str,
        content: Callable[[], bytes | AsyncIterator[bytes]] | None = None,
    ) -> AsyncIterator[httpx.Response]:  # fmt: skip
        """The answer to a request, whatever it is, after what the registry wants to know of us."""
        authorization = self.known.authorizations.get(endpoint, actions)
        for again in (True, False):
            async with self._http.send(
                method, url, headers, authorization=authorization, insecure=endpoint.insecure,
                content=content() if content is not None else None, follow=actions == "pull",
            ) as response:
                if response.status_code != 401 or not again:
                    yield response
                    return
                challenges = parse_challenges(response.headers.get_list("www-authenticate"))
            # A token that was good before may have come to its end.
            authorization, lifetime = await authorize(
                self._http, self.settings, endpoint, httpx.URL(url), challenges, actions)
            self.known.authorizations.put(endpoint, actions, authorization, lifetime)

    async def _scheme(self, endpoint: Endpoint) -> str:
        """Plain HTTP is for registries that may be insecure, and of those for the ones that know no TLS."""
        if not endpoint.insecure:
            return "https"
        known = self.known.schemes.get(endpoint.host)
        if known is None:
            try:
                async with self._http.send("GET", f"https://{endpoint.host}/v2/", {}, insecure=True, follow=False):
                    known = "https"
            except (TransientError, RegistryTLSError) as exc:
                if isinstance(exc, TransientError) and not exc.absent:
                    raise
                known = "http"
            self.known.schemes[endpoint.host] = known
        return known

    async def _check(
        self, endpoint: Endpoint, path: str, response: httpx.Response, method: str, *fine: int
    ) -> None:
        status = response.status_code
        if status in (fine or (200, 206)):
            return
        detail = "" if method == "HEAD" else _detail(await read_bounded(response, MAX_ERROR, "an error"))
        what = f"{endpoint.repository}{_pointed(path)}"
        if status == 404:
            raise ImageNotFoundError(f"{endpoint.host} has no {what}", hint="are its name and its tag right?")
        if status in (401, 403):
            found = await find_credentials(
                endpoint.registry, endpoint.repository, self.settings.registries.credentials)
            raise unauthorized(endpoint, found.tried, found.credentials, detail)
        if status == 416:
            raise ImageCorruptError(f"{endpoint.host} has fewer bytes of {what} than its image says")
        after = retry_after(response.headers)
        if status == 429:
            when = f"try again in {after:.0f} s" if after is not None else "try again later"
            raise TransientError(RateLimitedError(
                f"{endpoint.host} wants fewer requests{f': {detail}' if detail else ''}", retry_after=after,
                hint=f"{when}, with credentials (docker login), or through a mirror"), after=after)
        failure = RegistryError(f"{response.url.host} answers {status}{f': {detail}' if detail else ''}")
        raise TransientError(failure, after=after) if status in (408, 500, 502, 503, 504) else failure


def _verified(raw: bytes, pointer: str, stated: str, endpoint: Endpoint) -> str:
    for expected in (pointer, stated):
        if DIGEST.fullmatch(expected):
            algorithm, _, want = expected.partition(":")
            found = hashlib.new(algorithm, raw).hexdigest()
            if found != want:
                raise ImageCorruptError(f"{endpoint.host} sends a manifest with the digest {algorithm}:{found} "
                                        f"instead of {expected}", digest=expected)
            return expected
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def _pointed(path: str) -> str:
    kind, _, pointer = path.partition("/")
    if kind == "blobs":
        return f"'s blob {pointer}"
    return f"@{pointer}" if ":" in pointer else f":{pointer}"


def _detail(raw: bytes) -> str:
    """The first message of a registry's errors (distribution-spec, "Error Codes")."""
    try:
        for error in parse_document(raw, "error").get("errors").list():
            return printable((error.get("message").text() or error.get("code").text()).encode(), 200)
    except PykataError:
        pass
    return ""


def usable_elsewhere(error: ImageError) -> bool:
    """Whether another endpoint may do better after this error."""
    return isinstance(error, ImageNotFoundError | ImageUnauthorizedError | RegistryError)
