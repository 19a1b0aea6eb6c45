"""The server names at the beginning of a TLS connection (RFC 8446, 4.1.2, 4.1.4 and 5.1; RFC 6066, 3).

A server may ask for a second ClientHello (HelloRetryRequest), and servers take the name of that one. So we read until
something else follows, which a client sends only when the server has chosen.
"""

from __future__ import annotations

import re

from pykata.net.policy.shown import RefusedError

CHANGE, ALERT, HANDSHAKE, DATA = 20, 21, 22, 23     # types of records
CLIENT_HELLO = 1
WARNING, MOST_WARNINGS = 1, 5
SERVER_NAME, HOST_NAME, EARLY_DATA = 0, 0, 42
# encrypted_client_hello (RFC 9849) and what it was in drafts, encrypted_server_name first.
ENCRYPTED = frozenset((0xFE0D, 0xFE08, 0xFE09, 0xFE0A, 0xFF02, 0xFFCE))
MOST = 16 * 1024            # bytes of a ClientHello; with post-quantum key shares they have about 2000
MOST_ANYWHERE = 1 << 18     # of one that any server takes
MOST_RECORD = 1 << 14
LEAST_FINISHED = 16         # bytes of a record that is encrypted

_NAME = re.compile(rb"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)


def is_tls(data: bytes) -> bool | None:
    """Does it begin as TLS does, or as what servers may take for it (an alert first, the hello of SSL 2)?

    None if that can't be seen yet.
    """
    if not data:
        return None
    if data[0] in (CHANGE, ALERT, HANDSHAKE, DATA):
        return data[1] == 3 if len(data) > 1 else None
    if data[0] & 0x80 and data[2:3] in (b"", b"\1"):
        return data[3] in (0, 2, 3) if len(data) > 3 else None
    return False


class Handshake:
    """Reads what a client sends, from the first byte on, until it isn't a ClientHello."""

    def __init__(self) -> None:
        self.done = False
        self._rest = bytearray()
        self._message = bytearray()
        self._hellos = 0
        self._changed = False
        self._warnings = 0

    def feed(self, data: bytes) -> list[str]:
        """The server names, in lower case, of each ClientHello that ends in ``data``. Raises RefusedError."""
        self._rest += data
        names: list[str] = []
        while not self.done and (record := self._record()) is not None:
            kind, body = record
            if kind == HANDSHAKE and not self._is_encrypted(body):
                names += self._handshake(body)
            elif not self._hellos or self._message:
                raise RefusedError("tls", "it begins with something else than a ClientHello")
            elif kind == CHANGE:
                self._change(body)
            elif kind != ALERT or not self._goes_on(body):
                self.done = True
        return names

    def _record(self) -> tuple[int, bytes] | None:
        """The next one that is whole."""
        rest = self._rest
        if not rest:
            return None
        if rest[0] not in (CHANGE, ALERT, HANDSHAKE, DATA) or (len(rest) > 1 and rest[1] != 3):
            raise RefusedError("tls", "it isn't TLS")
        if not self._hellos and rest[0] != HANDSHAKE:
            raise RefusedError("tls", "it begins with another record than that of a ClientHello")
        if len(rest) < 5:
            return None
        end = 5 + int.from_bytes(rest[3:5])
        if rest[0] != DATA and not 5 < end <= 5 + MOST_RECORD + 256:
            raise RefusedError("tls", "a record of TLS has a length that none has")
        if rest[0] != DATA and len(rest) < end:
            if rest[0] == HANDSHAKE and not self._message and not self._hellos:
                self._check(bytes(rest[5:9]))
            return None
        found = rest[0], bytes(rest[5:end])
        del rest[:end]
        return found

    def _is_encrypted(self, body: bytes) -> bool:
        """Is it the end of a handshake that continues an earlier session? It may begin as a ClientHello would."""
        return (
            self._changed and not self._message and len(body) >= LEAST_FINISHED
            and int.from_bytes(body[1:4]) > MOST_ANYWHERE
        )  # fmt: skip

    def _goes_on(self, alert: bytes) -> bool:
        """Is it only a warning, which a server may pass over?"""
        self._warnings += 1
        if self._warnings > MOST_WARNINGS:
            raise RefusedError("tls", "it warns again and again")
        return len(alert) == 2 and alert[0] == WARNING

    def _change(self, body: bytes) -> None:
        if body != b"\1" or self._changed:
            raise RefusedError("tls", "it changes ciphers in a way that none does")
        self._changed = True

    def _handshake(self, body: bytes) -> list[str]:
        if self._hellos and not self._message and body[0] != CLIENT_HELLO:
            self.done = True
            return []
        self._message += body
        self._check(self._message)
        message = bytes(self._message)
        end = 4 + int.from_bytes(message[1:4])
        if len(message) < max(end, 4):
            return []
        if len(message) > end:
            raise RefusedError("tls", "something follows its ClientHello in the same record")
        self._message.clear()
        self._hellos += 1
        if self._hellos > 2:
            raise RefusedError("tls", "it sends a ClientHello once more than a server asks for")
        return [_name_in(message[4:])]

    def _check(self, message: bytes | bytearray) -> None:
        """Could it be the beginning of a ClientHello? Raises RefusedError."""
        if message and message[0] != CLIENT_HELLO:
            raise RefusedError("tls", "it begins with another message than a ClientHello")
        if len(message) >= 4 and int.from_bytes(message[1:4]) > MOST:
            raise RefusedError("tls", "its ClientHello is too long")


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
    if ENCRYPTED & found.keys():
        # Made-up ones (GREASE) can't be told from real ones (RFC 9849, 6.2), behind which may be any other name.
        raise RefusedError("ech", "it encrypts the server's name (ECH)")
    if EARLY_DATA in found:
        # After which a server may still ask for another ClientHello (RFC 8446, 4.1.2 and 4.2.10).
        raise RefusedError("early", "it sends data before the server has answered (0-RTT)")
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
