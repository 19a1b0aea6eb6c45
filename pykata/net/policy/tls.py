"""The server name in the first bytes of a TLS connection (RFC 8446, 4.1.2 and 5.1; RFC 6066, 3)."""

from __future__ import annotations

import re

from pykata.net.policy.shown import More, RefusedError

HANDSHAKE, CLIENT_HELLO = 22, 1
SERVER_NAME, HOST_NAME = 0, 0
ENCRYPTED = 0xFE0D          # encrypted_client_hello (RFC 9849)
MOST = 16 * 1024            # bytes of a ClientHello; with post-quantum key shares they have about 2000
MOST_RECORD = 1 << 14

_NAME = re.compile(rb"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)


def looks_like_tls(data: bytes) -> bool:
    """Could it be the start of a handshake, as far as can be seen?"""
    return b"\x16\x03".startswith(data[:2])


def server_name(data: bytes) -> str:
    """The name that the client asks for, in lower case.

    Raises More if the ClientHello goes on in what comes next, RefusedError if it has no name that could be read.
    """
    return _name_in(_client_hello(data))


def _client_hello(data: bytes) -> bytes:
    """The body of the first message, out of as many records as it takes."""
    message, rest = b"", data
    while not _whole(message):
        if not looks_like_tls(rest):
            raise RefusedError("tls", "it isn't TLS")
        if len(rest) < 5:
            raise More
        end = 5 + int.from_bytes(rest[3:5])
        if not 5 < end <= 5 + MOST_RECORD:
            raise RefusedError("tls", "a record of TLS has a length that none has")
        message += rest[5:end]
        if len(rest) < end and not _whole(message):
            raise More
        rest = rest[end:]
    return message[4 : 4 + int.from_bytes(message[1:4])]


def _whole(message: bytes) -> bool:
    """Is all of a ClientHello there?"""
    if message and message[0] != CLIENT_HELLO:
        raise RefusedError("tls", "it begins with another message than a ClientHello")
    if len(message) < 4:
        return False
    length = int.from_bytes(message[1:4])
    if length > MOST:
        raise RefusedError("tls", "its ClientHello is too long")
    return len(message) >= 4 + length


class _Reader:
    """Takes pieces off the front."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        if len(self.data) < count:
            raise RefusedError("tls", "its ClientHello contradicts itself")
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def vector(self, width: int) -> bytes:
        return self.take(int.from_bytes(self.take(width)))


def _name_in(hello: bytes) -> str:
    reader = _Reader(hello)
    reader.take(2 + 32)     # version, random
    reader.vector(1)        # session
    reader.vector(2)        # cipher suites
    reader.vector(1)        # compression
    extensions = _Reader(reader.vector(2) if reader.data else b"")
    if reader.data:
        raise RefusedError("tls", "its ClientHello contradicts itself")
    found: dict[int, bytes] = {}
    while extensions.data:
        kind, body = int.from_bytes(extensions.take(2)), extensions.vector(2)
        if kind in found:
            raise RefusedError("tls", "its ClientHello has an extension twice")
        found[kind] = body
    if SERVER_NAME not in found:
        raise RefusedError("sni", "it names no server in its ClientHello")
    if ENCRYPTED in found:
        # Made-up ones (GREASE) can't be told from real ones (RFC 9849, 6.2), behind which may be any other name.
        raise RefusedError("ech", "it encrypts the server's name (ECH)")
    return _host(found[SERVER_NAME])


def _host(body: bytes) -> str:
    names = _Reader(_Reader(body).vector(2))
    if len(body) != 2 + len(names.data):
        raise RefusedError("tls", "its server name contradicts itself")
    kind, name = int.from_bytes(names.take(1)), names.vector(2)
    if kind != HOST_NAME or names.data:
        raise RefusedError("sni", "it names its server in a way that can't be read")
    if not _NAME.fullmatch(name):
        raise RefusedError("sni", "the server's name in its ClientHello is none")
    return name.decode("ascii").lower().removesuffix(".")
