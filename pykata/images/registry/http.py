"""HTTP with registries: answers are bounded, and credentials don't follow a redirect to another host."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Self

import anyio
import httpx

from pykata import host
from pykata.errors import RegistryError, RegistryTLSError, RegistryUnreachableError
from pykata.images.registry.retry import TransientError
from pykata.images.registry.settings import Settings, is_this_machine, tls_context

MAX_REDIRECTS = 5
MAX_ERROR = 64 * 1024           # bytes of an answer that tells what went wrong

_REDIRECTS = {301, 302, 303, 307, 308}
_HEADERS = {"User-Agent": "pykata", "Accept-Encoding": "identity"}      # a digest is about what is stored


class Http:
    """A context manager; its connections are closed when it is left."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clients: dict[tuple[str, bool], httpx.AsyncClient] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def send(
        self, method: str, url: str, headers: Mapping[str, str], *, authorization: str = "", insecure: bool = False,
        form: Mapping[str, str] | None = None, content: bytes | AsyncIterator[bytes] | None = None, follow: bool = True,
    ) -> AsyncIterator[httpx.Response]:  # fmt: skip
        """The answer to a request, after redirects, its body not read yet.

        ``insecure`` is about the first host only. Raises TransientError, and :class:`~pykata.errors.RegistryError`.
        """
        with translated(url, self._settings.registries.timeout):
            target = httpx.URL(url)
            for _ in range(MAX_REDIRECTS + 1):
                client = await self._client(target, insecure)
                sent = {**_HEADERS, **headers, **({"Authorization": authorization} if authorization else {})}
                request = client.build_request(method, target, headers=sent, data=form, content=content)
                response = await _sent(client, request)
                try:
                    if not follow or response.status_code not in _REDIRECTS:
                        yield response
                        return
                    following = await self._redirected(target, response)
                finally:
                    await response.aclose()
                if origin(following) != origin(target):
                    authorization, insecure = "", insecure and following.host == target.host
                target = following
            raise RegistryError(f"{url} redirects more than {MAX_REDIRECTS} times")

    async def _redirected(self, source: httpx.URL, response: httpx.Response) -> httpx.URL:
        target = source.join(response.headers.get("location", ""))
        if target.scheme != "https" and (source.scheme == "https" or target.scheme != "http"):
            raise RegistryError(f"{source.host} redirects to {_shown(target)}, which isn't secure")
        if target.userinfo or not target.host:
            raise RegistryError(f"{source.host} redirects to {_shown(target)}, which no registry should")
        await check_public(target.host, source.host, f"{source.host} redirects to {_shown(target)}")
        return target

    async def _client(self, url: httpx.URL, insecure: bool) -> httpx.AsyncClient:
        place = url.netloc.decode()
        client = self._clients.get((place, insecure))
        if client is None:
            registries = self._settings.registries
            client = httpx.AsyncClient(
                verify=tls_context(registries, place, insecure) if url.scheme == "https" else False,
                timeout=httpx.Timeout(registries.timeout, pool=None), follow_redirects=False,
                trust_env=not is_this_machine(place),       # a proxy would look for this machine's ports at its own
            )
            self._clients[place, insecure] = await self._stack.enter_async_context(client)
        return client


async def _sent(client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
    """The answer to a request. If it is cancelled, the connection that is being made for it is closed.

    httpcore (1.0) does that for errors only: a cancelled TLS handshake would leave its socket to the garbage collector.
    """
    opened: list[Any] = []

    async def trace(event: str, info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            opened.append(info["return_value"])

    request.extensions["trace"] = trace
    try:
        return await client.send(request, stream=True)
    except BaseException:
        for stream in opened:
            await host.finish(stream.aclose())
        raise


def origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _shown(url: httpx.URL) -> str:
    """Without its query: that of a redirect has a signature that is as good as a password."""
    text = str(url.copy_with(query=None, fragment=None, username=None, password=None))
    return "".join(c for c in text[:200] if c.isprintable())


async def read_bounded(response: httpx.Response, limit: int, what: str) -> bytes:
    """The body of an answer. Raises RegistryError if it is longer."""
    raw = bytearray()
    async for chunk in response.aiter_raw():
        raw += chunk
        if len(raw) > limit:
            raise RegistryError(f"{response.url.host} sends {what} of more than {limit} bytes")
    return bytes(raw)


# --- private places ---


async def check_public(target: str, source: str, what: str) -> None:
    """A registry on the internet mustn't send us to a place that only we can reach. Raises RegistryError."""
    if target != source and await _is_private(target) and not await _is_private(source):
        raise RegistryError(f"{what}, a private address", hint="is this registry what you think it is?")


async def _is_private(name: str) -> bool:
    if is_this_machine(name):
        return True
    try:
        return not ipaddress.ip_address(name).is_global
    except ValueError:
        pass
    try:
        found = await anyio.getaddrinfo(name, 443, type=socket.SOCK_STREAM)
    except OSError:
        return False            # behind a proxy it may be known to that alone; without one it can't be reached anyway
    return any(not ipaddress.ip_address(address[0].partition("%")[0]).is_global for *_, address in found)


# --- errors ---


@contextmanager
def translated(url: str, timeout: float) -> Iterator[None]:
    """Everything that httpx raises becomes one of ours."""
    server = httpx.URL(url).host
    try:
        yield
    except httpx.ConnectError as exc:
        raise _unconnected(server, exc) from exc
    except httpx.ConnectTimeout as exc:
        silent = RegistryUnreachableError(f"{server} doesn't answer for {timeout:g} s")
        raise TransientError(silent, absent=True) from exc
    except httpx.TimeoutException as exc:
        raise TransientError(RegistryUnreachableError(f"{server} stopped answering for {timeout:g} s")) from exc
    except httpx.ProxyError as exc:
        refused = RegistryUnreachableError(f"the proxy doesn't connect {server}: {exc}"[:300],
                                           hint="see HTTPS_PROXY, HTTP_PROXY and NO_PROXY")
        raise TransientError(refused, absent=True) from exc
    except httpx.TransportError as exc:
        if _is_about_tls(exc):
            raise _unconnected(server, exc) from exc
        why = str(exc) or type(exc).__name__
        raise TransientError(RegistryUnreachableError(f"the connection to {server} broke: {why}"[:300])) from exc
    except httpx.InvalidURL as exc:
        raise RegistryError(f"{server} names an address that is none: {exc}"[:300]) from exc


def _unconnected(server: str, exc: Exception) -> Exception:
    causes = list(_causes(exc))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RegistryTLSError(
                f"the certificate of {server} isn't valid: {cause.verify_message}",
                hint=f"put its authority into /etc/docker/certs.d/{server}/ca.crt, or give Registries(ca_file=...)",
            )
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return RegistryTLSError(f"{server} can't be talked to in TLS: {causes[-1]}"[:300],
                                hint=f"does it speak plain HTTP? Then give Registries(insecure=({server!r},))")
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return TransientError(RegistryUnreachableError(f"there is no host {server!r}", hint="or is the network down?"),
                              absent=True)
    why = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), str(exc))
    return TransientError(RegistryUnreachableError(f"can't connect to {server}: {why}"[:300]), absent=True)


def _is_about_tls(exc: BaseException) -> bool:
    return any(isinstance(cause, ssl.SSLError) for cause in _causes(exc))


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        if isinstance(exc, BaseExceptionGroup):     # several addresses were tried
            for one in exc.exceptions:
                yield from _causes(one)
        exc = exc.__cause__ or exc.__context__
