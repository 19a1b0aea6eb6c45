"""The host that each request of a plain HTTP/1 connection is for (RFC 9112).

A connection may carry requests for many hosts, so it is read as long as it lasts. Where two readers could see different
requests in the same bytes (RFC 9112, 11.2), it is refused.
"""

from __future__ import annotations

import re

from pykata.net.policy.shown import RefusedError

MOST_HEAD = 16 * 1024
MOST_LINE = 256             # of a chunk's size, and of a line of a trailer

_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~]+) HTTP/1\.[01]")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_HOST = re.compile(rb"([a-z0-9_.-]{1,253})(?::(\d{1,5}))?", re.IGNORECASE)
_ABSOLUTE = re.compile(rb"http://([^/?#]*)(?:[/?#].*)?", re.IGNORECASE)
_STARTS = re.compile(rb"[\r\n]*[^\r\n]* HTTP/\d[^\r\n]*\r?\n")
_SIZE = re.compile(rb"([0-9a-fA-F]{1,12})(?:[ \t]*;[\t\x20-\x7e]*)?")


def looks_like_http(data: bytes) -> bool:
    """Could it be the start of a request, as far as can be seen?"""
    word, space, _ = data[:33].partition(b" ")
    return bool(word) and bool(_METHOD.fullmatch(word)) and word.isupper() and (bool(space) or len(data) < 33)


def is_http(data: bytes) -> bool | None:
    """Does it begin with a request, of whatever version of HTTP? None if that can't be seen yet."""
    line = data.lstrip(b"\r\n")
    if b"\n" not in line and len(line) < MOST_HEAD:
        return None if not line or looks_like_http(line) else False
    return bool(_STARTS.match(data))


class Requests:
    """Reads what a client sends, from the first byte on."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._body = 0              # bytes of a body, or of a chunk, that are to come
        self._chunked = False
        self._ending = False        # what comes is the line end behind a chunk
        self._trailer = False
        self._line = bytearray()

    def feed(self, data: bytes) -> list[str]:
        """The hosts, in lower case and without ports, of the requests whose heads end in ``data``.

        Raises RefusedError.
        """
        hosts: list[str] = []
        while data:
            if self._body:
                taken = min(self._body, len(data))
                self._body -= taken
                data = data[taken:]
            elif self._chunked:
                data = self._chunk_line(data)
            else:
                data = self._heads(data, hosts)
        return hosts

    def _heads(self, data: bytes, hosts: list[str]) -> bytes:
        start = max(len(self._head) - 3, 0)
        self._head += data
        end = self._head.find(b"\r\n\r\n", start)
        if (len(self._head) if end < 0 else end) > MOST_HEAD:
            raise RefusedError("http", "the head of a request is too long")
        if end < 0:
            if not looks_like_http(bytes(self._head[:64])):
                raise RefusedError("http", "it isn't HTTP")
            return b""
        head, rest = bytes(self._head[:end]), bytes(self._head[end + 4 :])
        self._head.clear()
        hosts.append(self._request(head))
        return rest

    def _request(self, head: bytes) -> str:
        first, *lines = head.split(b"\r\n")
        match = _LINE.fullmatch(first)
        if match is None:
            raise RefusedError("http", "it isn't a request of HTTP/1")
        fields: dict[bytes, list[bytes]] = {}
        for line in lines:
            field = _FIELD.fullmatch(line)
            if field is None:
                raise RefusedError("http", "a field of a request can be read in two ways")
            fields.setdefault(field[1].lower(), []).append(field[2].strip(b" \t"))
        self._expect_body(fields)
        if match[1] == b"CONNECT":
            raise RefusedError("connect", "it asks for a tunnel (CONNECT)")
        if b"upgrade" in fields:
            raise RefusedError("upgrade", "it asks for another protocol (Upgrade)")
        return self._host(match[2], fields.get(b"host", []))

    def _expect_body(self, fields: dict[bytes, list[bytes]]) -> None:
        lengths, codings = fields.get(b"content-length", []), fields.get(b"transfer-encoding", [])
        if len(lengths) + len(codings) > 1:
            raise RefusedError("http", "a request has more than one length")
        if lengths:
            if not lengths[0].isdigit() or len(lengths[0]) > 15:
                raise RefusedError("http", "the length of a request is none")
            self._body = int(lengths[0])
        if codings:
            if codings[0].lower() != b"chunked":
                raise RefusedError("http", "a request has a transfer coding that can't be read")
            self._chunked, self._trailer = True, False

    def _host(self, target: bytes, hosts: list[bytes]) -> str:
        if len(hosts) != 1:
            raise RefusedError("host", "a request names no host, or several")
        found = _authority(hosts[0])
        if not target.startswith(b"/") and target != b"*":
            absolute = _ABSOLUTE.fullmatch(target)
            if absolute is None or _authority(absolute[1]) != found:
                raise RefusedError("host", "a request names one host in its line and another one as Host")
        return found[0]

    def _chunk_line(self, data: bytes) -> bytes:
        """The size of a chunk, its end, or a line of the trailer that ends the body (RFC 9112, 7.1)."""
        end = data.find(b"\n") + 1
        piece, rest = (data[:end], data[end:]) if end else (data, b"")
        self._line += piece
        if len(self._line) > MOST_LINE:
            raise RefusedError("http", "a line of a chunked body is too long")
        if end:
            line = bytes(self._line)
            self._line.clear()
            if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
                raise RefusedError("http", "a line of a chunked body ends in two ways")
            self._after(line[:-2])
        return rest

    def _after(self, line: bytes) -> None:
        if self._ending:
            if line:
                raise RefusedError("http", "a chunk is longer than it says")
            self._ending = False
            return
        if self._trailer:
            if line and not _FIELD.fullmatch(line):
                raise RefusedError("http", "a trailer can be read in two ways")
            self._chunked = bool(line)
            return
        size = _SIZE.fullmatch(line)
        if size is None:
            raise RefusedError("http", "the size of a chunk is none")
        self._trailer = int(size[1], 16) == 0
        self._body = int(size[1], 16)
        self._ending = not self._trailer


def _authority(text: bytes) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    if match is None:
        raise RefusedError("host", "a request names a host in a way that can't be read")
    return match[1].decode().lower().removesuffix("."), int(match[2] or 0)
