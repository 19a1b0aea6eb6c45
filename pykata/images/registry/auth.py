"""Authorization at a registry: challenges (RFC 9110, 11), Basic (RFC 7617), and tokens from the server it names.

distribution: "Token Authentication Specification" and "OAuth 2.0 Authentication".
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import httpx
from attrs import define, field, frozen

from pykata.errors import ImageCorruptError, ImageUnauthorizedError, RegistryError
from pykata.images.document import parse_document
from pykata.images.registry.credentials import Credentials, Found, find_credentials
from pykata.images.registry.http import MAX_ERROR, Http, check_public, read_bounded
from pykata.images.registry.retry import TransientError, retry_after
from pykata.images.registry.settings import Endpoint, Settings

MAX_CHALLENGE = 8192
LIFETIME = 60.0                 # seconds of a token that doesn't say; the specification's default
SLACK = 5.0                     # seconds before its end from which on it isn't used

_SCHEME = re.compile(r"\s*,?\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)(?:\s+|$)")
_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_TOKEN = re.compile(r"[\x21-\x7e]+")


@frozen
class Challenge:
    """What a registry wants: ``scheme`` is in lower case, and so are the names of ``parameters``."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(headers: list[str]) -> list[Challenge]:
    """The challenges of WWW-Authenticate headers; what can't be read ends a header."""
    found = []
    for header in headers:
        text, at = header[:MAX_CHALLENGE], 0
        while match := _SCHEME.match(text, at):
            at = match.end()
            parameters: dict[str, str] = {}
            while pair := _PARAMETER.match(text, at):
                at = pair.end()
                value = pair[3] if pair[2] is None else re.sub(r"\\(.)", r"\1", pair[2])
                parameters.setdefault(pair[1].lower(), value)
            found.append(Challenge(match[1].lower(), parameters))
    return found


@define
class Authorizations:
    """What registries accepted so far, by host, repository and actions: the value of the header, and when it ends."""

    _known: dict[tuple[str, str, str], tuple[str, float]] = field(factory=dict, repr=False)

    def get(self, endpoint: Endpoint, actions: str) -> str:
        value, until = self._known.get((endpoint.host, endpoint.repository, actions), ("", 0.0))
        return value if time.monotonic() < until else ""

    def put(self, endpoint: Endpoint, actions: str, value: str, lifetime: float) -> None:
        self._known[endpoint.host, endpoint.repository, actions] = value, time.monotonic() + lifetime - SLACK


async def authorize(
    http: Http, settings: Settings, endpoint: Endpoint, url: httpx.URL, challenges: list[Challenge], actions: str
) -> tuple[str, float]:
    """The answer to the challenges of the request to ``url``, and its lifetime in seconds.

    Raises :class:`~pykata.errors.ImageUnauthorizedError` if there is none.
    """
    found = await find_credentials(endpoint.registry, endpoint.repository, settings.registries.credentials)
    for challenge in challenges:
        if challenge.scheme == "bearer" and "realm" in challenge.parameters:
            return await _token(http, endpoint, url, challenge, found, actions)
        if challenge.scheme == "basic" and found.credentials is not None and found.credentials.user:
            return found.credentials.basic(), float("inf")
    raise unauthorized(endpoint, found.tried, found.credentials)


def unauthorized(
    endpoint: Endpoint, tried: tuple[str, ...], used: Credentials | None, detail: str = ""
) -> ImageUnauthorizedError:
    """Which credentials there were, and what to do; never what they are."""
    if used is not None:
        why = f"with the credentials from {used.source}"
    elif tried:
        why = f"without credentials: there are none for it in {', '.join(tried)}"
    else:
        why = "without credentials: there are none on this machine"
    return ImageUnauthorizedError(
        f"{endpoint.host} refuses {endpoint.repository} {why}{f': {detail}' if detail else ''}", tried=tried,
        hint=f"is the name right? If it is private: docker login {endpoint.registry}, or Registries(credentials=...)",
    )


async def _token(
    http: Http, endpoint: Endpoint, url: httpx.URL, challenge: Challenge, found: Found, actions: str
) -> tuple[str, float]:
    realm = await _realm(challenge.parameters["realm"], endpoint, url)
    scope = {"scope": f"repository:{endpoint.repository}:{actions}"}
    if service := challenge.parameters.get("service", ""):
        scope["service"] = service
    credentials, form, authorization = found.credentials, None, ""
    if credentials is not None and credentials.identity_token:
        form = {**scope, "grant_type": "refresh_token", "client_id": "pykata",
                "refresh_token": credentials.identity_token}
    elif credentials is not None:
        authorization = credentials.basic()
    where = realm if form else realm.copy_merge_params(scope)
    async with http.send(
        "POST" if form else "GET", str(where), {"Accept": "application/json"}, authorization=authorization,
        insecure=endpoint.insecure and realm.host == url.host, form=form, follow=False,
    ) as response:
        raw = await read_bounded(response, MAX_ERROR, "a token")
    if response.status_code in (400, 401, 403):
        raise unauthorized(endpoint, found.tried, credentials, f"{realm.host} gives no token for it")
    if response.status_code != 200:
        failure = RegistryError(f"{realm.host}, which gives tokens for {endpoint.host}, answers {response.status_code}")
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise TransientError(failure, after=retry_after(response.headers))
        raise failure
    return _parse(raw, realm.host)


async def _realm(text: str, endpoint: Endpoint, url: httpx.URL) -> httpx.URL:
    """Where to ask for a token: credentials go there."""
    try:
        realm = httpx.URL(text)
    except httpx.InvalidURL:
        realm = httpx.URL("")
    named = f"{endpoint.host} wants tokens from {text[:200]!r}"
    # A registry that is allowed to speak plain HTTP may have its tokens from a server that does.
    if realm.scheme != "https" and not (realm.scheme == "http" and url.scheme == "http" and endpoint.insecure):
        raise RegistryError(f"{named}, which isn't secure")
    if realm.userinfo or not realm.host:
        raise RegistryError(f"{named}, which is no address")
    await check_public(realm.host, url.host, named)
    return realm


def _parse(raw: bytes, host: str) -> tuple[str, float]:
    try:
        answer = parse_document(raw, f"the token of {host}")
        token = answer.get("token").text() or answer.get("access_token").text()
        lifetime = answer.get("expires_in").value
    except ImageCorruptError as exc:
        raise RegistryError(f"{host} gives no token: {exc.message}") from exc
    if not _TOKEN.fullmatch(token):
        raise RegistryError(f"{host} gives a token that isn't one")
    given = isinstance(lifetime, int | float) and not isinstance(lifetime, bool) and lifetime > 0
    return f"Bearer {token}", max(float(lifetime), LIFETIME) if given else LIFETIME
