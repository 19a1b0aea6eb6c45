"""A small HTTP/1.1 server on loopback whose every byte a test decides, and a proxy with faults for a real one."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress

from attrs import define, field, frozen

HEAD = 64 * 1024


@frozen
class Request:
    """A request as it came; the names of ``headers`` are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""


@frozen
class Answer:
    """An answer: ``length`` is what its header says of the body (None: what is true), ``cut`` where it breaks off.

    ``drip``: a header without an end comes byte by byte.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(factory=dict)
    length: int | None = None
    cut: int | None = None
    endless: bool = False
    drip: bool = False
    stall: bool = False


Handler = Callable[[Request], Answer | Awaitable[Answer]]


@define
class Server:
    """Where it listens, and what it was asked."""

    host: str = ""
    requests: list[Request] = field(factory=list)

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def seen(self, header: str) -> list[str]:
        """All values of a header that were sent."""
        return [request.headers[header] for request in self.requests if header in request.headers]


@asynccontextmanager
async def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Serve on a free port of 127.0.0.1 while the block runs. Every answer ends its connection."""
    server, tasks = Server(), set[asyncio.Task[None]]()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
                request = await _read(reader)
                server.requests.append(request)
                answer = handler(request)
                await _write(writer, request, answer if isinstance(answer, Answer) else await answer)
        finally:
            tasks.discard(task)
            writer.close()

    listener = await asyncio.start_server(one, "127.0.0.1", 0, ssl=tls, limit=HEAD)
    server.host = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Request:
    first_byte = await reader.readexactly(1)
    if first_byte == b"\x16":        # somebody speaks TLS to us
        raise ConnectionError
    head = (first_byte + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))


async def _drip(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 Answer\r\nX: ")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def _write(writer: asyncio.StreamWriter, request: Request, answer: Answer) -> None:
    if answer.drip:
        await _drip(writer)
    headers = {"Connection": "close", **answer.headers}
    if not answer.endless and answer.status != 304:
        headers["Content-Length"] = str(len(answer.body) if answer.length is None else answer.length)
    lines = [f"HTTP/1.1 {answer.status} Answer", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    if request.method != "HEAD":
        writer.write(answer.body[:answer.cut])
        await writer.drain()
        while answer.endless:
            writer.write(b" " * HEAD)
            await writer.drain()
    if answer.stall:
        await asyncio.Event().wait()


def json_answer(value: object, media_type: str = "application/json", **more: object) -> Answer:
    return Answer(json.dumps(value).encode(), headers={"Content-Type": media_type}, **more)  # type: ignore[arg-type]


def through(upstream: str, fault: Callable[[Request, Answer], Answer | None]) -> Handler:
    """A handler that asks ``upstream``, and lets ``fault`` have a look at each answer; None leaves it as it is."""

    async def handle(request: Request) -> Answer:
        host, port = upstream.split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=HEAD)
        try:
            kept = {name: value for name, value in request.headers.items() if name != "connection"}
            lines = [f"{request.method} {request.path} HTTP/1.1", "Connection: close",
                     *(f"{name}: {value}" for name, value in kept.items())]
            writer.write("\r\n".join([*lines, "", ""]).encode() + request.body)
            answer = _answer(request, await reader.read())
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        return fault(request, answer) or answer

    return handle


def _answer(request: Request, raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.partition(":") for line in lines]
    skipped = {"content-length", "connection", "transfer-encoding"}
    headers = {name: value.strip() for name, _, value in pairs if name.lower() not in skipped}
    chunked = any(name.lower() == "transfer-encoding" for name, _, _ in pairs)
    length = next((int(value) for name, _, value in pairs if name.lower() == "content-length"), None)
    body = _joined(body) if chunked else body
    return Answer(body, int(first.split(" ")[1]), headers, length if request.method == "HEAD" else None)


def _joined(body: bytes) -> bytes:
    joined = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        count = int(size, 16)
        joined, body = joined + rest[:count], rest[count + 2:]
        if not count:
            break
    return joined
